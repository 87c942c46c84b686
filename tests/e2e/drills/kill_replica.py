"""One of two replicas dies."""

from pathlib import Path

from krea2_srt.testing.load import DONE, UNAVAILABLE, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load

CLIENTS = 4


def _run(model: Path, folder: Path) -> None:
    with Deployment(model, folder, ["--replicas", "2"]) as deployment:
        load = Load(deployment.url, CLIENTS)
        with under_load(deployment, load):
            load.phase = "during"
            victim, other = deployment.engines()
            victim.kill()
            deployment.wait_until(lambda: deployment.queue()["replicas_ready"] == 1, "it is missed")
            load.wait_for(5)
            load.think_s = 1.0
            deployment.wait_until_ready(2)
            load.think_s = 0.0
            load.phase = "after"
            load.wait_for(5)
            check(other in deployment.engines(), "the other replica has gone on")
        lost = (load.counts() - load.counts("after"))[UNAVAILABLE]
        check(lost <= CLIENTS, "only requests that were on the dead replica fail")
        check(set(load.counts()) <= {DONE, UNAVAILABLE}, "with a 503")
        check(set(load.counts("after")) == {DONE}, "both generate again")


DRILL = Drill(
    "kill-replica",
    "SIGKILL to one engine of two",
    "only the requests that it had get a 503; the other serves on, and it is started anew",
    run_alone=_run,
)
