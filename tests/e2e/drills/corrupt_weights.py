"""A weight file is cut short on the disk, and then the engine dies."""

import shutil
from pathlib import Path

from krea2_srt.testing.load import DONE, UNAVAILABLE, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load


def _run(model: Path, folder: Path) -> None:
    copy = folder / "krea-2"
    shutil.copytree(model, copy)
    weights = max((copy / "transformer").glob("*.safetensors"), key=lambda f: f.stat().st_size)
    whole = weights.read_bytes()
    with Deployment(copy, folder) as deployment:
        load = Load(deployment.url, pause_s=1)
        with under_load(deployment, load):
            load.phase = "during"
            # Not in place: the running engine may have it mapped.
            weights.unlink()
            weights.write_bytes(whole[: len(whole) // 2])
            deployment.engines()[0].kill()
            deployment.wait_until(lambda: weights.name in deployment.log, "the log names it", 180)
            deployment.wait_until(
                lambda: "has exited with code 2" in deployment.log, "the start fails"
            )
            weights.write_bytes(whole)
            deployment.wait_until_ready()
            load.phase = "after"
            load.wait_for(5)
        check(set(load.counts("during")) <= {DONE, UNAVAILABLE}, "503 meanwhile")
        check(set(load.counts("after")) == {DONE}, "with the file back, images again")


DRILL = Drill(
    "corrupt-weights",
    "a weight file cut in half, and the engine killed",
    "the log names the file, requests get a 503, the start is tried again, and once the file is "
    "whole it serves, without anybody's hand",
    run_alone=_run,
)
