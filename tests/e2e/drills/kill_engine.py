"""The only engine dies, as by a driver fault."""

from krea2_srt.testing.load import DONE, UNAVAILABLE, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load


def _run(deployment: Deployment) -> None:
    load = Load(deployment.url)
    with under_load(deployment, load):
        load.phase = "during"
        (engine,) = deployment.engines()
        engine.kill()
        deployment.wait_until(lambda: deployment.queue()["replicas_ready"] == 0, "it is missed")
        deployment.wait_until_ready()
        load.phase = "after"
        load.wait_for(5)
        check(deployment.engines() != [engine], "the engine is a new one")
    check(set(load.counts("before")) <= {DONE, UNAVAILABLE}, "a 503 at once")
    check(set(load.counts("during")) <= {DONE, UNAVAILABLE}, "503 meanwhile")
    check(set(load.counts("after")) == {DONE}, "after that, images again")


DRILL = Drill(
    "kill-engine",
    "SIGKILL to the only engine",
    "its requests, and new ones until it is back, get a 503 with a time to wait; the server starts "
    "it anew by itself",
    run=_run,
)
