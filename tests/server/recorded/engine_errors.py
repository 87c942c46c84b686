"""What the engine refuses, and what fails in it: said before the answer begins, and in a stream."""

from krea2_srt.errors import DeadlineError, DrainingError
from krea2_srt.messages import EngineError
from tests.server.recorded.exchange import Exchange, generate, stream

_INVALID = {
    "prompt": "prompt: is not valid Unicode text",
    "width": "width: must be a multiple of 16, got 65",
    "height": "height: must be between 16 and 1024, got 2048",
    "steps": "steps: must be between 1 and 50, got 100",
    "guidance": "guidance: must be between 0 and 1, got 2",
    "num_images": "num_images: must be between 1 and 2, got 4",
    "seed": "seed: must be between 0 and 5, got 7",
    "deadline_s": "deadline_s: must be a finite number",
    "mu": "mu: must be between -10 and 10, got 11",
}
_ERRORS = {
    **{
        f"invalid {name}": EngineError("invalid_value", text, name)
        for name, text in _INVALID.items()
    },
    "invalid, no field": EngineError("invalid_value", "this cannot be"),
    "queue full": EngineError("queue_full", "the queue is full: 9.5 s", retry_after_s=3.2),
    "queue full for long": EngineError("queue_full", "the queue is full", retry_after_s=1e4),
    "queue full for ever": EngineError("queue_full", "the queue is full", retry_after_s=1e400),
    "queue full, no time": EngineError("queue_full", "the queue is full"),
    "draining": EngineError.of(DrainingError("the engine is shutting down")),
    "deadline": EngineError.of(DeadlineError("the deadline has passed after 3 of 8 steps")),
    "out of memory": EngineError("out_of_memory", "CUDA out of memory: 7 of 8 GiB"),
    "cancelled": EngineError("cancelled", "the request was cancelled"),
    "failed": EngineError("generation_failed", "the image has non-finite values \ud800"),
    "an unknown code": EngineError("new", "something else"),
}


def _errors() -> list[Exchange]:
    found = []
    for name, error in _ERRORS.items():
        refused, failed = {"refuse": error}, {"error": error}
        found.append(generate(f"engine, refused: {name}", refused))
        found.append(stream(f"engine, failed in a stream: {name}", engine=failed))
        if "invalid" not in name or name == "invalid steps":
            found.append(generate(f"engine, failed: {name}", failed))
            found.append(stream(f"engine, refused in a stream: {name}", engine=refused))
    return found


_SHORT = {"loses_an_image": True}

ENGINE_ERRORS = [
    *_errors(),
    generate("an image too few", _SHORT, fields={"n": 2}),
    stream("an image too few in a stream", {"num_inference_steps": 1}, engine=_SHORT),
]
