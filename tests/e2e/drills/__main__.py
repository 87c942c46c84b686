"""``python -m tests.e2e.drills [NAME ...]``: runs drills, all by default, on servers of its own.

It starts krea2-serve on loopback, breaks something under load, and checks what docs/operations.md
promises. Exit code 0 if all promises are kept.
"""

import argparse
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from tests.e2e.drills import (
    clock_jump,
    corrupt_weights,
    exhaust_memory,
    fill_disk,
    kill_engine,
    kill_replica,
    sigterm,
    stall_network,
)
from tests.e2e.drills.drill import Drill, DrillFailedError
from tests.e2e.drills.performance import Drills

DRILLS: dict[str, Drill] = {
    module.DRILL.name: module.DRILL
    for module in (
        kill_engine,
        exhaust_memory,
        # Last of those that share a server: it ends it.
        sigterm,
        kill_replica,
        corrupt_weights,
        fill_disk,
        clock_jump,
        stall_network,
    )
}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.e2e.drills", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(DRILLS))
    parser.add_argument("--model", type=Path, required=True, help="folder of a checkpoint")
    parser.add_argument("--keep", type=Path, help="folder for logs; else they go when all is well")
    args = parser.parse_args(argv)
    if unknown := set(args.names) - set(DRILLS):
        parser.error(f"{', '.join(sorted(unknown))}: must be of {', '.join(DRILLS)}")
    folder = args.keep or Path(tempfile.mkdtemp(prefix="krea2-drills-"))
    with closing(Drills(args.model.resolve(), folder.resolve())) as drills:
        results = {name: _run(DRILLS[name], drills) for name in args.names or DRILLS}
    print()
    for name, result in results.items():
        print(f"{result:8} {name}")
    if "failed" in results.values():
        raise SystemExit(f"logs are in {folder}")
    if args.keep is None:
        shutil.rmtree(folder)


def missing(drill: Drill) -> str | None:
    """Why a drill cannot run here."""
    if drill.needs_root and os.geteuid() != 0:
        return "needs root"
    if drill.needs and shutil.which(drill.needs) is None:
        return f"needs {drill.needs}"
    return None


def _run(drill: Drill, drills: Drills) -> str:
    print(f"\n{drill.name}: {drill.breaks}")
    print(f"  must be: {drill.promise}")
    if reason := missing(drill):
        print(f"  skipped: {reason}")
        return "skipped"
    try:
        drills.perform(drill)
    except DrillFailedError as error:
        print(f"  FAILED: not so: {error}")
        return "failed"
    except Exception:
        traceback.print_exc(file=sys.stdout)
        return "failed"
    return "kept"


if __name__ == "__main__":
    main()
