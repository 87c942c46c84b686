"""Requests that end in images: each field, each format, and streams."""

from krea2_srt.request import MAX_SEED
from tests.server.recorded.exchange import JSON, Exchange, generate, stream
from tests.server.recorded.pictures import SMALL

# The picture of a random seed, and of a size that is not what an exchange is about.
_ANY = {"picture": SMALL}
_GUIDED = {"guidance_scale": 3.5, "negative_prompt": "blur"}


def _fields() -> list[Exchange]:
    """One field at a time."""
    values: list[dict[str, object]] = [
        {"n": 1},
        {"n": 3},
        {"n": 10, "size": "16x16"},
        {"size": "64x96"},
        {"size": "192x64"},
        {"size": "auto", "width": 64, "height": 80},
        {"size": "64x80", "width": 64, "height": 80},
        {"size": None, "width": 80, "height": 64},
        {"background": "opaque"},
        {"background": "auto"},
        {"moderation": "auto"},
        {"output_format": "png"},
        {"output_format": "png", "output_compression": 100},
        {"output_format": "jpeg"},
        {"output_format": "jpeg", "output_compression": 0},
        {"output_format": "jpeg", "output_compression": 60},
        {"output_format": "webp"},
        {"output_format": "webp", "output_compression": 0},
        {"output_format": "webp", "output_compression": 80},
        {"response_format": "b64_json"},
        {"response_format": "url"},
        {"response_format": "url", "n": 2, "output_format": "jpeg"},
        {"response_format": "url", "output_format": "webp", "output_compression": 50},
        {"stream": False},
        {"partial_images": 0},
        {"user": "user-1"},
        {"safety_identifier": "person-1"},
        {"user": "user-1", "safety_identifier": "person-1"},
        {"user": ""},
        {"seed": 0},
        {"seed": MAX_SEED},
        {"seed": MAX_SEED, "n": 2},
        {"num_inference_steps": 1},
        {"num_inference_steps": 200},
        {"guidance_scale": 0},
        {"guidance_scale": 4},
        {"guidance_scale": 4.25},
        {"guidance_scale": 100.0},
        _GUIDED,
        {**_GUIDED, "negative_prompt": "", "n": 2},
        {"priority": 10},
        {"priority": -10},
        {"priority": 0},
        {"deadline_ms": 60_000},
        {"deadline_ms": 1500.5},
        {"model": "krea-2-turbo"},
        {"model": "krea/Krea-2-Turbo"},
        {"model": "gpt-image-1"},
        {"prompt": "x" * 32_000},
        {**_GUIDED, "negative_prompt": "y" * 32_000},
    ]
    return [generate(_name(fields), fields=fields) for fields in values]


def _qualities() -> list[Exchange]:
    qualities = ("low", "medium", "high", "xhigh", "max", "auto", "standard", "hd", None)
    return [
        generate(f"quality {quality}, its own size", _ANY, fields={"quality": quality, "size": it})
        for quality in qualities
        for it in ("auto" if quality != "low" else None,)
    ] + [generate("quality low of a size", fields={"quality": "low", "num_inference_steps": 3})]


def _seeds() -> list[Exchange]:
    """The server chooses one."""
    left_out = ("seed",)
    return [
        generate("a prompt alone", _ANY, leave_out=("seed", "size")),
        generate("a random seed", _ANY, leave_out=left_out),
        generate("random seeds of three images", _ANY, leave_out=left_out, fields={"n": 3}),
        stream("a random seed in a stream", engine=_ANY, leave_out=left_out, fields={"n": 2}),
    ]


_ALL_NULL = dict.fromkeys(
    (
        *("model", "n", "quality", "background", "moderation", "output_format"),
        *("output_compression", "response_format", "stream", "partial_images", "user"),
        *("safety_identifier", "num_inference_steps", "guidance_scale", "negative_prompt"),
        *("priority", "deadline_ms", "width", "height", "style", "image", "mask"),
    )
)


def _media_types() -> list[Exchange]:
    types = ("application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json")
    return [
        generate(f"content-type {media_type}", headers={"content-type": media_type})
        for media_type in types
    ]


def _bodies() -> list[Exchange]:
    small = b'{"prompt":"x","size":"64x64","seed":1}'
    chunked = b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (small[:9], small[9:]))
    line = b"POST /v1/images/generations HTTP/1.1\r\nhost: images.test\r\n"
    kind = b"content-type: application/json\r\n"
    return [
        Exchange("spaces around the JSON", headers=JSON, body=b" \n" + small + b"\n "),
        Exchange("an escaped prompt", headers=JSON, body=small.replace(b'"x"', b'"\\u00e4\\n"')),
        Exchange("a name that comes twice", headers=JSON, body=small[:-1] + b',"seed":2}'),
        Exchange(
            "a query that says nothing", path="/v1/images/generations?x=1", headers=JSON, body=small
        ),
        Exchange(
            "a connection that is to be closed", headers={**JSON, "connection": "close"}, body=small
        ),
        Exchange(
            "a body in chunks",
            raw=line + kind + b"transfer-encoding: chunked\r\n\r\n" + chunked + b"0\r\n\r\n",
        ),
        Exchange(
            "HTTP/1.0",
            raw=line.replace(b"/1.1", b"/1.0") + kind + b"content-length: 38\r\n\r\n" + small,
        ),
        Exchange(
            "an offer of another protocol",
            headers={
                **JSON,
                "connection": "Upgrade, HTTP2-Settings",
                "upgrade": "h2c",
                "http2-settings": "AAMAAABk",
            },
            body=small,
        ),
    ]


def _streams() -> list[Exchange]:
    values: list[dict[str, object]] = [
        {"n": 2},
        {"partial_images": 0},
        {"partial_images": 1},
        {"partial_images": 2},
        {"partial_images": 3},
        {"partial_images": 2, "n": 2},
        {"partial_images": 3, "num_inference_steps": 2},
        {"partial_images": 3, "num_inference_steps": 1},
        {"partial_images": 1, "output_format": "jpeg", "output_compression": 50},
        {"partial_images": 1, "output_format": "webp"},
        {"response_format": "url"},
        {"response_format": "url", "n": 2, "partial_images": 1},
        {"user": "user-1", "partial_images": 1},
        {"quality": "high", "partial_images": 1},
        {**_GUIDED},
        {"priority": 3, "deadline_ms": 60_000, "num_inference_steps": 1},
        {"prompt": "x" * 32_000, "num_inference_steps": 1},
        {"model": "gpt-image-1", "num_inference_steps": 1},
    ]
    few = {"num_inference_steps": 4}
    return [
        stream("a stream of all steps"),
        *(stream(f"a stream, {_name(fields)}", {**few, **fields}) for fields in values),
    ]


def _name(fields: dict[str, object]) -> str:
    texts = {name: str(value) for name, value in fields.items()}
    return ", ".join(f"{k} {v if len(v) < 40 else 'long'}" for k, v in texts.items()) or "plain"


GOOD = [
    generate("nothing but the usual"),
    generate("every field null", fields=_ALL_NULL),
    generate("a prompt of odd signs", fields={"prompt": "狐狸 🦊 «renard» \u202e\x00\x1b[2J"}),
    *_fields(),
    *_qualities(),
    *_seeds(),
    *_media_types(),
    *_bodies(),
    *_streams(),
]
