"""Policies: whose turn it is.

A policy gives every request a key in seconds of clock time; the smallest key runs first. A key
must depend on nothing but the request, so that requests that wait need not be sorted again. Each
level of priority is a head start of `PRIORITY_HEAD_START_S` seconds under every policy; so is
waiting, which is why nothing starves: a request is never behind one of its priority that arrived
later than its own key.
"""

from collections.abc import Callable

from krea2_srt.engine.lifecycle import Request

PRIORITY_HEAD_START_S = 60.0

STRETCH = 32.0
"""How many seconds of waiting outweigh a second of remaining work, under `srpt`.

In the simulator, smaller ones fall back to the order of arrival when there is too much work (8:
98 % of requests late at load 1.05; 32: 39 %; 64: 15 %), and larger ones only lengthen the longest
wait, which is what this bounds.
"""

Policy = Callable[[Request], float]


def srpt(request: Request) -> float:
    """Shortest remaining work first, with ageing.

    The classical aged key is remaining work minus waiting time / `STRETCH`; divided by the same
    clock for all, that is arrival + `STRETCH` * remaining work.
    """
    return request.arrival + STRETCH * request.remaining_ms / 1e3 - _head_start(request)


def edf(request: Request) -> float:
    """Earliest deadline first. A request is due when `srpt` says so, unless its deadline is sooner:
    one that is far away makes nothing less urgent.
    """
    if request.deadline is None:
        return srpt(request)
    return min(request.deadline - _head_start(request), srpt(request))


def _head_start(request: Request) -> float:
    return PRIORITY_HEAD_START_S * request.priority


POLICIES: dict[str, Policy] = {"srpt": srpt, "edf": edf}
