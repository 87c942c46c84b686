"""Bodies that clients have packed: read within the limits, or refused."""

import gzip
import json
import zlib

import httpx
import pytest

BODY = json.dumps({"prompt": "x", "size": "64x64", "seed": 7}).encode()
PATH = "/v1/images/generations"


def post(server, content: bytes, encoding: str) -> httpx.Response:
    headers = {"content-type": "application/json", "content-encoding": encoding}
    return httpx.post(server.url + PATH, content=content, headers=headers, timeout=60)


@pytest.mark.parametrize(
    ("encoding", "pack"),
    [
        ("gzip", gzip.compress),
        ("GZIP", gzip.compress),
        ("x-gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("identity", bytes),
    ],
)
def test_a_packed_body_is_read(fake_server, engine, encoding, pack):
    usual = post(fake_server, BODY, "identity").json()["data"]
    assert post(fake_server, pack(BODY), encoding).json()["data"] == usual


@pytest.mark.parametrize("encoding", ["br", "zstd", "gzip, gzip", "compress"])
def test_another_packing_is_refused_by_name(fake_server, engine, encoding):
    refused = post(fake_server, BODY, encoding)
    assert (refused.status_code, refused.json()["error"]["code"]) == (415, "unsupported_encoding")
    assert encoding in refused.json()["error"]["message"]


@pytest.mark.parametrize(
    "content",
    [BODY, b"", gzip.compress(BODY)[:-9], gzip.compress(BODY) + b"x", gzip.compress(BODY)[:5]],
)
def test_what_is_not_packed_as_it_says_is_refused(fake_server, engine, content):
    refused = post(fake_server, content, "gzip")
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "bad_request")


def test_a_small_body_that_unpacks_to_a_large_one_is_refused(fake_server, engine):
    packed = gzip.compress(b" " * 2**28)
    assert len(packed) < 2**20
    assert post(fake_server, packed, "gzip").status_code == 413
    assert not engine.requests
