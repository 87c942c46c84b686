"""How long threads that wait for each other spin, decided before torch loads OpenMP's library.

On a CPU torch computes with OpenMP's threads, and GCC's libgomp, which torch ships, lets each of
them spin for some milliseconds when it has to wait for the others. Beside another process that
computes, the spinning ones hold the cores that those they wait for need. libgomp reads these
variables once, when it is loaded: they belong into the environment of a process, or in front of its
``import torch``.
"""

import os
from collections.abc import Mapping, MutableMapping

SPIN_COUNT = 10_000
"""Turns of libgomp's loop, after which a thread sleeps: longer than most waits between the small
operations of a forward. benchmarks/results/threads.md compares counts.
"""

VARIABLES = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
"""By which a user says how threads wait; KMP_BLOCKTIME is for Intel's and LLVM's libraries."""


def wait_variables(environment: Mapping[str, str]) -> dict[str, str]:
    """What to add to an environment: nothing where the user has decided."""
    if any(name in environment for name in VARIABLES):
        return {}
    return {"GOMP_SPINCOUNT": str(SPIN_COUNT)}


def limit_spinning(environment: MutableMapping[str, str] = os.environ) -> None:
    """The same to an environment, by default this process's, where torch is not loaded yet."""
    environment.update(wait_variables(environment))
