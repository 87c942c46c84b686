"""A server whose engine comes and goes, and which ends; with a small storage."""

from tests.server.recorded.exchange import HELD, generate, get, stream
from tests.server.recorded.stage import Stage

_AWAY = {"away": True}
_URL = {"response_format": "url"}

LEAVING = [
    generate("no engine yet", _AWAY),
    stream("no engine yet for a stream", engine=_AWAY),
    generate("refused before there is an engine", _AWAY, fields={"n": 0}),
    generate("the model's name before there is an engine", _AWAY, fields={"model": "krea-9"}),
    get("/health", engine=_AWAY, logged=False),
    get("/ready", "not ready before there is an engine", engine=_AWAY, logged=False),
    get("/v1/models", "the models before there is an engine", engine=_AWAY),
    get("/v1/models/krea-2-turbo", "the model before there is an engine", engine=_AWAY),
    get("/v1/queue", "the queue before there is an engine", engine=_AWAY, logged=False),
    generate("the engine is there"),
    generate("a URL of a server with another name", fields={**_URL, "size": "16x16"}),
    generate("an image that no storage is large enough for", fields=_URL),
    stream("such an image in a stream", {**_URL, "num_inference_steps": 1}),
    generate("an engine that exits", meanwhile=Stage.stop_engine),
    generate("while the engine is away", _AWAY),
    stream("a stream while the engine is away", engine=_AWAY),
    get("/ready", "not ready while the engine is away", engine=_AWAY, logged=False),
    stream(
        "an engine that exits before it has accepted",
        engine={"silent": True},
        meanwhile=Stage.stop_engine,
    ),
    stream("an engine that exits after it has accepted", meanwhile=Stage.stop_engine),
    generate("the engine is back"),
    # The last: the server ends with it.
    generate(
        "a server that ends, and what it still has",
        headers={"expect": "100-continue"},
        meanwhile=Stage.drain,
        beside=(HELD, stream("held")),
        releases=False,
        counted=False,
    ),
]
