"""A scheduler process without a model: `FakeEngine` started as `krea2_srt.sglang.worker` is.

For what is promised of whoever starts engines, and would be the same with any: a real one takes
half a minute of a core to start, and this one none.

``python -m krea2_srt.testing.fake_worker --ready-fd N --parent-pid N [--step-s S]`` serves until
SIGTERM, or until its parent has ended.
"""

import argparse
import json
import os
import time
from collections.abc import Sequence

from krea2_srt.testing.fake_engine import FakeEngine

MODULE = "krea2_srt.testing.fake_worker"
_POLL_S = 0.2


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog=f"python -m {MODULE}", allow_abbrev=False)
    parser.add_argument("--ready-fd", type=int, required=True, help="told where it listens")
    parser.add_argument("--parent-pid", type=int, required=True, help="ends it by its own end")
    parser.add_argument("--step-s", type=float, default=0.0, help="time of a step of one image")
    args = parser.parse_args(argv)
    # As the real one: whatever stops the parent's group is for the parent.
    os.setpgid(0, 0)
    with FakeEngine(step_s=args.step_s) as engine:
        with os.fdopen(args.ready_fd, "w") as pipe:
            pipe.write(json.dumps({"status": "ready", "endpoint": engine.endpoint}) + "\n")
        while os.getppid() == args.parent_pid:
            time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
