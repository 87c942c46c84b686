"""The machine's clock is set a day ahead, and back."""

from pathlib import Path

import httpx

from krea2_srt.testing.load import DONE, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load


def _run(model: Path, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    offset = folder / "offset"
    offset.write_text("+0")
    environment = {
        # Not by the command faketime: that stays between, and keeps signals from the server.
        "LD_PRELOAD": str(next(Path("/usr/lib").glob("*/faketime/libfaketimeMT.so.1"))),
        "FAKETIME_TIMESTAMP_FILE": str(offset),
        "FAKETIME_NO_CACHE": "1",
        # As of a real clock that is set: the monotonic one goes on.
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
    }
    with Deployment(model, folder, environment=environment) as deployment:
        load = Load(deployment.url)
        with under_load(deployment, load):
            url = deployment.generate(size="64x64", response_format="url").json()["data"][0]["url"]
            check(httpx.get(url).status_code == 200, "an image is behind its URL")
            load.phase = "during"
            offset.write_text("+1d")
            load.wait_for(5)
            check(httpx.get(url).status_code == 410, "its hour is over a day later")
            offset.write_text("+0")
            load.phase = "after"
            load.wait_for(5)
            check(deployment.queue()["replicas_ready"] == 1, "the engine was never missed")
        check(set(load.counts()) == {DONE}, "no request fails")


DRILL = Drill(
    "clock-jump",
    "the clock set a day ahead and back (libfaketime)",
    "no request fails or waits longer, no engine is taken for dead; URLs older than their hour end",
    run_alone=_run,
    needs="faketime",
)
