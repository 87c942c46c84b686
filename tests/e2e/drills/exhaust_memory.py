"""Memory runs out for large images."""

import resource

from krea2_srt.testing.load import DONE, Load
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill, check, under_load

_ROOM = 150 * 2**20
"""Bytes beyond what the engine has: enough for small images, and not for one of 2048x2048."""


def _run(deployment: Deployment) -> None:
    load = Load(deployment.url, clients=2, sizes=("64x64", "128x128"))
    with under_load(deployment, load):
        (engine,) = deployment.engines()
        limits = engine.rlimit(resource.RLIMIT_AS)
        load.phase = "during"
        engine.rlimit(resource.RLIMIT_AS, (engine.memory_info().vms + _ROOM, limits[1]))
        # Large ones have priority: behind small ones they may wait for minutes.
        answer = deployment.generate(size="2048x2048", num_inference_steps=1, priority=10)
        print(f"  2048x2048 without memory: {answer.status_code} {answer.text[:80]}")
        check(answer.status_code == 503, "what does not fit gets a 503")
        check(answer.json()["error"]["code"] == "out_of_memory", "that says why")
        check(answer.headers["x-should-retry"] == "false", "and not to try again")
        load.wait_for(5)
        engine.rlimit(resource.RLIMIT_AS, limits)
        load.phase = "after"
        generated = deployment.generate(size="512x512", num_inference_steps=2, priority=10)
        check(generated.status_code == 200, "with memory it is generated")
        load.wait_for(5)
        check(deployment.engines() == [engine], "the engine is the same one")
    check(set(load.counts()) == {DONE}, "small images go on all the time")


DRILL = Drill(
    "exhaust-memory",
    "no memory left for a 2048x2048 image (RLIMIT_AS of the engine)",
    "that request alone gets a 503 out_of_memory; others and the engine go on",
    run=_run,
)
