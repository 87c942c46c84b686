"""The disk that images are stored on fills up."""

import subprocess
from pathlib import Path

from krea2_srt.testing.load import DONE, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load

_SIZE = "4m"


def _run(model: Path, folder: Path) -> None:
    disk = folder / "disk"
    disk.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={_SIZE}", "tmpfs", disk], check=True)
    try:
        with Deployment(model, folder, ["--storage", str(disk / "images")]) as deployment:
            load = Load(deployment.url, fields={"response_format": "url"})
            with under_load(deployment, load):
                load.phase = "during"
                ballast = disk / "ballast"
                _fill(ballast)
                load.wait_for(5, "503 storage_full")
                answer = deployment.generate(size="64x64")
                check(answer.status_code == 200, "b64_json needs no disk")
                ballast.unlink()
                load.phase = "after"
                load.wait_for(5)
            check(set(load.counts()) <= {DONE, "503 storage_full"}, "a 503 that says why")
            # Those on their way while it was emptied may have failed still.
            check(load.counts("after")[DONE] >= 5, "with room again, images")
            check(not list((disk / "images").glob("*.partial")), "nothing half-written stays")
    finally:
        subprocess.run(["umount", disk], check=True)


def _fill(file: Path) -> None:
    with file.open("wb", buffering=0) as ballast:
        try:
            while True:
                ballast.write(bytes(2**12))
        except OSError:
            pass


DRILL = Drill(
    "fill-disk",
    "no room left where images are stored",
    "requests for URLs get a 503 storage_full that says so, b64_json goes on, nothing half-written "
    "stays",
    run_alone=_run,
    needs_root=True,
)
