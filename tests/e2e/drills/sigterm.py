"""The server is told to end while it is busy, as at every rollout."""

from krea2_srt.testing.load import DONE, NO_ANSWER, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, print_counts


def _run(deployment: Deployment) -> None:
    load = Load(deployment.url, clients=6, sizes=("256x256", "512x512"))
    with load.running():
        load.wait_for(3)
        load.phase = "during"
        deployment.terminate()
        code = deployment.wait()
        load.phase = "after"
        load.wait_for(3, NO_ANSWER)
    print_counts(load)
    check(code == 0, f"it ends with exit code 0, not {code}")
    check(set(load.counts("before")) == {DONE}, "what was accepted is finished")
    check(
        set(load.counts("during")) <= {NO_ANSWER, "503 draining"},
        "what comes after that is refused",
    )
    check(set(load.counts("after")) == {NO_ANSWER}, "and then nobody answers")


DRILL = Drill(
    "sigterm",
    "SIGTERM under load",
    "every accepted request is finished, later ones are refused, and the exit code is 0",
    run=_run,
)
