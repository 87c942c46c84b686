"""What is left of an answer when ids, times and signatures are taken out; all else stays as it is.

Pictures and long texts become digests of their bytes.
"""

import base64
import dataclasses
import hashlib
import io
import json
import re
from typing import Any

from PIL import Image

from krea2_srt import __version__
from krea2_srt.messages import GenerateRequest
from krea2_srt.request import ImageRequest
from tests.server.recorded.connection import Answer
from tests.server.recorded.exchange import DEFAULTS, Exchange

_LONGEST = 400
_AN_HOUR_S = 3600
_PICTURE = re.compile(rb'"b64_json":"([A-Za-z0-9+/=]+)"')
_CREATED = re.compile(r'"(created|created_at)":[12][0-9]{9}\b')
_SEED = re.compile(r'"seed":([0-9]+)')
_FILE = re.compile(
    r"/[0-9a-f]{32}\.(png|jpeg|webp)\?expires=[0-9]{10}&signature=[0-9a-f]{64}(?![0-9a-f])"
)
_USAGE = re.compile(
    r'"usage":\{"input_tokens":(\d+),'
    r'"input_tokens_details":\{"image_tokens":0,"text_tokens":\1\},'
    r'"output_tokens":(\d+),'
    r'"output_tokens_details":\{"image_tokens":\2,"text_tokens":0\},'
    r'"total_tokens":(\d+)\}'
)
"""One whose parts agree; only such a one becomes shorter."""
_REQUEST_ID = re.compile(r"req_[0-9a-f]{32}")
_DATE = re.compile(r"date: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT")
_ADDRESS = re.compile(r"http://127\.0\.0\.1:[0-9]+")
_METRIC_TIMES = re.compile(r"^(# (HELP|TYPE) )?krea2_\w+_(created|bucket|sum)[ {].*\n", re.M)

_USUAL = {
    "date: <date>": "date",
    "x-request-id: <id>": "id",
    "x-content-type-options: nosniff": "nosniff",
    "content-type: application/json": "json",
    "cache-control: no-store": "no-store",
    "x-accel-buffering: no": "unbuffered",
    "content-type: text/event-stream; charset=utf-8": "events",
    "transfer-encoding: chunked": "chunked",
}
"""Headers that many answers have: shorter in the recording."""
_OF_ANY_LENGTH = ("/metrics", "/openapi.json")
"""Times have more or fewer digits, as random seeds have; and so have versions."""
_VERSION = f'"version":"{__version__}"'.encode()
_TIMINGS = '"timings":{"queue_ms":1.0,"encode_ms":2.0,"denoise_ms":30.0,"decode_ms":4.0}'


class Normaliser:
    """For what belongs to one exchange.

    Args:
        exchange: the one.
        request_id: the server's for it; empty where it has given none.
        first_seed: that the server has chosen; None where the client has.
        file_name: that the server has last given a URL of; empty of none.
    """

    def __init__(
        self, exchange: Exchange, request_id: str, first_seed: int | None, file_name: str = ""
    ) -> None:
        self._exchange = exchange
        self._request_id = request_id
        self._first_seed = first_seed
        self._file_name = file_name

    def answer(self, answer: Answer) -> dict[str, Any]:
        """As it is recorded."""
        kind = answer.header("content-type")
        if kind.startswith("image/"):
            body = [_digest_of_picture(answer.whole)]
        elif self._exchange.path == "/openapi.json":
            body = [_digests_of_parts(answer.whole.replace(_VERSION, b'"version":"<version>"'))]
        else:
            body = [self._text(_with_digests(chunk).decode()) for chunk in answer.body]
        head = [self._header(line, answer) for line in answer.head]
        values: dict[str, Any] = {"head": [_USUAL.get(line, line) for line in head]}
        values["body"] = body if answer.header("transfer-encoding") else "".join(body)
        if answer.closed:
            values["closed"] = True
        return values

    def log_line(self, line: dict[str, Any]) -> str:
        """With the names of the first fields left out, which every line has."""
        values = {key: value for key, value in line.items() if key not in ("time", "ms")}
        first = [values.pop(key) for key in ("level", "logger", "message")]
        if "exc_info" in values:
            values["exc_info"] = "<traceback>"
        rest = [f"{key}={value}" for key, value in values.items()]
        return self._text(" ".join([*first, *rest]))

    def message(self, message: GenerateRequest) -> dict[str, Any]:
        """What the engine was asked for, but for what is a default or as usual."""
        changed = _changed(message, GenerateRequest)
        values = {**_changed(changed.pop("image"), ImageRequest), **changed}
        if values["request_id"] == self._request_id:
            del values["request_id"]
        if "adapters" in values:
            values["adapters"] = {one.name: one.scale for one in values["adapters"]}
        values = {key: _shortened(value) for key, value in values.items()}
        found: dict[str, Any] = json.loads(self._text(json.dumps(values, separators=(",", ":"))))
        return found

    def _header(self, line: str, answer: Answer) -> str:
        name, _, value = line.partition(": ")
        if name == "date":
            assert _DATE.fullmatch(line), line
            return "date: <date>"
        varies = self._first_seed is not None or self._exchange.path in _OF_ANY_LENGTH
        if name == "content-length" and varies:
            # The reader has held it to the body.
            return "content-length: <length>"
        if name == "cache-control" and value.startswith("private, immutable, max-age="):
            left_s = int(value.rpartition("=")[2])
            assert 3000 < left_s <= _AN_HOUR_S, line
            return line.replace(str(left_s), "<seconds left>")
        if name.startswith("retry-after") and b'"rate_limit_exceeded"' in answer.whole:
            # Until the bucket has a request again, which depends on when it was asked.
            return f"{name}: <wait>"
        return self._text(line)

    def _text(self, text: str) -> str:
        text = _REQUEST_ID.sub(self._id, text)
        text = _CREATED.sub(r'"\1":"<time>"', text)
        text = text.replace(_TIMINGS, '"timings":"<the engine\'s>"')
        text = _USAGE.sub(_usage, text)
        text = _FILE.sub(r"/<name>.\1?expires=<time>&signature=<signature>", text)
        if self._file_name:
            text = text.replace(self._file_name, "<name>")
        text = _ADDRESS.sub("http://127.0.0.1:<port>", text)
        if self._first_seed is not None:
            text = _SEED.sub(self._seed, text)
        if self._exchange.path == "/metrics":
            text = _METRIC_TIMES.sub("", text)
        return text

    def _id(self, found: re.Match[str]) -> str:
        return "<id>" if found[0] == self._request_id else "<another id>"

    def _seed(self, found: re.Match[str]) -> str:
        return f'"seed":"<random + {int(found[1]) - (self._first_seed or 0)}>"'


def describe(exchange: Exchange) -> str:
    """A request in a line, for whoever reads the recording."""
    if exchange.raw is not None:
        return _shortened(exchange.raw.decode("latin-1"))
    told = {**exchange.headers, "content-type": exchange.headers.get("content-type", "none")}
    if told["content-type"] == ("application/json" if exchange.body is not None else "none"):
        del told["content-type"]
    headers = "".join(f" {name}: {value};" for name, value in told.items())
    usual = json.dumps(DEFAULTS)[1:-1]
    body = _shortened((exchange.body or b"").decode("latin-1").replace(usual, "..."))
    return _shortened(f"{exchange.method} {exchange.path}") + f"{headers} {body}".rstrip()


def _usage(found: re.Match[str]) -> str:
    read, generated, total = map(int, found.groups())
    return f'"usage":"<{read} + {generated}>"' if read + generated == total else found[0]


def _with_digests(text: bytes) -> bytes:
    def digest(found: re.Match[bytes]) -> bytes:
        picture = base64.b64decode(found[1], validate=True)
        return b'"b64_json":"%s"' % _digest_of_picture(picture).encode()

    return _PICTURE.sub(digest, text)


def _digest_of_picture(data: bytes) -> str:
    with Image.open(io.BytesIO(data)) as image:
        kind, (width, height) = str(image.format).lower(), image.size
    return f"<{kind} {width}x{height} sha256:{_sha256(data)}>"


def _digests_of_parts(data: bytes) -> str:
    """What tells, of a large document, where it is different."""
    document = json.loads(data)
    parts = {**document.pop("paths"), **document.pop("components")["schemas"], "rest": document}
    digests = [f"{name} {_sha256(json.dumps(part).encode())}" for name, part in parts.items()]
    return f"<sha256:{_sha256(data)}, of its parts: {', '.join(digests)}>"


def _shortened(value: Any) -> Any:
    if not isinstance(value, str) or len(value) <= _LONGEST:
        return value
    digest = _sha256(value.encode(errors="replace"))
    return f"{value[:40]}... <{len(value)} characters sha256:{digest}>"


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _changed(value: Any, of: type) -> dict[str, Any]:
    """Fields of a dataclass that are not their defaults."""
    return {
        field.name: getattr(value, field.name)
        for field in dataclasses.fields(of)
        if getattr(value, field.name) != field.default
    }
