"""What the server refuses before the engine hears of it: values, bodies, paths and methods."""

import json

from tests.server.recorded.exchange import IMAGES, JSON, Exchange, generate, get, stream

_VALUES: list[dict[str, object]] = [
    {"prompt": ""},
    {"prompt": None},
    {"prompt": 3},
    {"prompt": ["a"]},
    {"prompt": "x" * 32_001},
    {"prompt": "\ud800"},
    {"model": "krea-9"},
    {"model": ""},
    {"model": 1},
    {"model": "m" * 257},
    {"n": 0},
    {"n": 11},
    {"n": "2"},
    {"n": 1.5},
    {"n": True},
    {"size": "0x0"},
    {"size": "65x64"},
    {"size": "64x65"},
    {"size": "64"},
    {"size": "x"},
    {"size": "-64x64"},
    {"size": "64x64 "},
    {"size": "4112x4112"},
    {"size": "4096x2048"},
    {"size": "64x208"},
    {"size": "208x64"},
    {"size": "9" * 33},
    {"size": 64},
    {"quality": "best"},
    {"quality": 1},
    {"background": "transparent"},
    {"background": "red"},
    {"moderation": "high"},
    {"output_format": "gif"},
    {"output_format": "svg"},
    {"output_format": "bmp"},
    {"output_compression": 50},
    {"output_compression": 101, "output_format": "jpeg"},
    {"output_compression": -1, "output_format": "webp"},
    {"output_compression": "high"},
    {"response_format": "file"},
    {"stream": "yes"},
    {"stream": 1},
    {"partial_images": 1},
    {"partial_images": 4, "stream": True},
    {"partial_images": -1, "stream": True},
    {"user": "u" * 513},
    {"user": 5},
    {"safety_identifier": "u" * 513},
    {"seed": -1},
    {"seed": 2**63},
    {"seed": 10**30},
    {"seed": 1.0},
    {"seed": "7"},
    {"num_inference_steps": 0},
    {"num_inference_steps": 201},
    {"num_inference_steps": 2.5},
    {"guidance_scale": -0.5},
    {"guidance_scale": 101},
    {"guidance_scale": "high"},
    {"negative_prompt": "blur"},
    {"negative_prompt": 1},
    {"negative_prompt": "y" * 32_001, "guidance_scale": 1},
    {"priority": 11},
    {"priority": -11},
    {"priority": "high"},
    {"deadline_ms": 0},
    {"deadline_ms": 10**12},
    {"deadline_ms": "soon"},
    {"size": None, "width": 64},
    {"size": None, "height": 64},
    {"size": None, "width": 64, "height": 65},
    {"size": None, "width": 65, "height": 64},
    {"size": None, "width": 64, "height": 0},
    {"size": None, "width": 4112, "height": 64},
    {"size": None, "width": 4096, "height": 2048},
    {"size": None, "width": 208, "height": 64},
    {"size": None, "width": 64, "height": 208},
    {"size": "64x80", "width": 64, "height": 64},
    {"width": "64", "height": 64},
    {"style": "vivid"},
    {"complexity": 3},
    {"frame_count": 2},
    {"frame_duration_ms": 20},
    {"svg": {}},
    {"image": "aGVsbG8="},
    {"mask": "aGVsbG8="},
    {"input_fidelity": "high"},
    {"cfg_scale": 3},
    {"x" * 100: 1},
    {"n": 0, "seed": -1},
]

_BODIES = {
    "no body": b"",
    "half of a body": b"{",
    "null": b"null",
    "a list": b"[]",
    "a text": b'"text"',
    "no UTF-8": b"\xff\xfe",
    "single quotes": b"{'prompt': 'x'}",
    "NaN": b'{"prompt": "x", "guidance_scale": NaN}',
    "infinity": b'{"prompt": "x", "guidance_scale": Infinity}',
    "no fields": b"{}",
    "too many digits": b'{"prompt": "x", "seed": ' + b"9" * 5000 + b"}",
    "too deep": b"[" * 100_000,
}

_PATHS = (
    *("/nope", "/v1", "/v1/images", "/v1/images/generations/", "/v1/chat/completions"),
    *("/v1/images/files/", "/v1/images/files/nothing.png", "/v1/images/files/%00"),
    *("/v1/models/krea-9", "/v1/models/" + "m" * 257, "/update_weights_from_disk"),
)
_METHODS = (
    *(("GET", IMAGES), ("PUT", IMAGES), ("DELETE", "/v1/models"), ("PATCH", "/v1/models")),
    *(("OPTIONS", IMAGES), ("HEAD", "/v1/models"), ("GET", "/v1/images/edits")),
    *(("DELETE", "/v1/images/files/nothing.png"), ("PROPFIND", "/")),
)
_HARDLY_HTTP = {
    "no HTTP": b"hello\r\n\r\n",
    "another version": b"GET / HTTP/9.9\r\n\r\n",
    "a length that is no number": b"POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n",
    "CONNECT": b"CONNECT x:443 HTTP/1.1\r\nhost: x\r\n\r\n",
    "too many headers": b"GET / HTTP/1.1\r\nhost: x\r\nx: " + b"y" * 40_000 + b"\r\n\r\n",
}


def _name(fields: dict[str, object]) -> str:
    texts = {name: json.dumps(value) for name, value in fields.items()}
    return ", ".join(f"{k[:20]} {v if len(v) < 40 else 'long'}" for k, v in texts.items())


def _unsupported() -> list[Exchange]:
    form = b'--b\r\ncontent-disposition: form-data; name="prompt"\r\n\r\nx\r\n--b--\r\n'
    kinds = (
        (JSON, b'{"prompt": "x"}'),
        ({"content-type": "multipart/form-data; boundary=b"}, form),
    )
    return [
        Exchange(
            f"{path} as {headers['content-type'][:9]}", "POST", f"/v1/images/{path}", headers, body
        )
        for path in ("edits", "variations")
        for headers, body in kinds
    ]


REFUSALS = [
    *(generate(f"refused: {_name(fields)}", fields=fields) for fields in _VALUES),
    generate("refused: no prompt", leave_out=("prompt",)),
    stream("refused in a stream: n", {"n": 0}),
    stream("refused in a stream: size", {"size": "65x64"}),
    stream("refused in a stream: model", {"model": "krea-9"}),
    *(Exchange(f"body: {name}", headers=JSON, body=body) for name, body in _BODIES.items()),
    *(
        Exchange(f"content-type {kind}", headers={"content-type": kind}, body=b'{"prompt": "x"}')
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data")
    ),
    Exchange("no content-type", body=b'{"prompt": "x"}'),
    Exchange("a body that is too large", headers={**JSON, "content-length": str(2**20 + 1)}),
    *_unsupported(),
    *(get(path) for path in _PATHS),
    *(get(path, method=method) for method, path in _METHODS),
    *(Exchange(name, raw=raw, logged=False) for name, raw in _HARDLY_HTTP.items()),
]
