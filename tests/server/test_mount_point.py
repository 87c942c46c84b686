"""The app mounted under a prefix, as Ray Serve mounts it: both the path and ASGI's ``root_path``
have the prefix.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx
import pytest

from krea2_server.app import create_app
from krea2_server.assembly import create_services
from krea2_server.engine.client import EngineClient
from krea2_server.keys import Keys
from krea2_server.settings import load_settings
from krea2_srt.testing.fake_engine import FakeEngine

KEY = {"authorization": "Bearer a-key-of-sixteen-signs"}
BODY = {"prompt": "x", "size": "64x64", "response_format": "url"}


@asynccontextmanager
async def mounted(
    prefix: str, engine: FakeEngine, folder: Path, *flags: str
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of the app, whose paths begin with the prefix by themselves."""
    flags = ("--api-keys", "a-key-of-sixteen-signs", "--storage", str(folder), *flags)
    settings = load_settings(flags)
    ours = EngineClient(1)
    try:
        await ours.attach(0, engine.endpoint)
        async with create_services(settings, Keys.from_settings(settings), None, ours) as services:
            transport = httpx.ASGITransport(
                create_app(services), root_path=prefix, client=("10.0.0.7", 4711)
            )
            async with httpx.AsyncClient(
                transport=transport, base_url=f"http://localhost:8000{prefix}"
            ) as client:
                yield client
    finally:
        ours.close()


@pytest.mark.parametrize("prefix", ["/krea", "/a/b", "/v1", "/v1/images"])
def test_images_and_their_files_are_under_the_prefix(prefix, engine, tmp_path):
    async def generated() -> None:
        async with mounted(prefix, engine, tmp_path) as client:
            for path in ("/v1/images/generations", "/images/generations/"):
                answer = await client.post(path, json=BODY, headers=KEY)
                url = answer.json()["data"][0]["url"]
                assert url.startswith(f"http://localhost:8000{prefix}/v1/images/files/")
                file = await client.get(url)
                assert (file.status_code, file.headers["content-type"]) == (200, "image/png")

    asyncio.run(generated())


def test_a1111s_paths_and_errors_are_under_it_too(engine, tmp_path):
    async def asked() -> None:
        async with mounted("/krea", engine, tmp_path) as client:
            body = {"prompt": "x", "width": 64, "height": 64}
            answer = await client.post("/sdapi/v1/txt2img", json=body, headers=KEY)
            assert len(answer.json()["images"]) == 1
            for path, sent in (("txt2img", {"prompt": ""}), ("nowhere", {})):
                refused = (await client.post(f"/sdapi/v1/{path}", json=sent, headers=KEY)).json()
                assert refused["detail"] == refused["error"]["message"]

    asyncio.run(asked())


def test_a_proxy_before_it_may_have_taken_off_another_prefix(engine, tmp_path):
    async def generated() -> None:
        async with mounted("/krea", engine, tmp_path, "--trusted-proxies", "10.0.0.7") as client:
            said = {
                "x-forwarded-host": "images.example",
                "x-forwarded-proto": "https",
                "x-forwarded-prefix": "/api",
            }
            answer = await client.post("/v1/images/generations", json=BODY, headers={**KEY, **said})
            url = answer.json()["data"][0]["url"]
            assert url.startswith("https://images.example/api/krea/v1/images/files/")

    asyncio.run(generated())


@pytest.mark.parametrize("prefix", ["/krea", "/v1"])
def test_who_has_no_key_is_refused_there_too(prefix, engine, tmp_path):
    async def refused() -> None:
        async with mounted(prefix, engine, tmp_path) as client:
            for path in ("/v1/models", "/v1/queue", "/models"):
                assert (await client.get(path)).status_code == 401
                assert (await client.get(path, headers=KEY)).status_code == 200
            answer = await client.post("/v1/images/generations", json=BODY)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "no_api_key")

    asyncio.run(refused())
    assert not engine.requests


def test_what_else_there_is_is_under_the_prefix(engine, tmp_path):
    async def found() -> None:
        async with mounted("/krea", engine, tmp_path) as client:
            for path in ("/health", "/ready", "/metrics", "/", "/playground/playground.js"):
                assert (await client.get(path)).status_code == 200, path
            assert (await client.head("/health")).status_code == 200
            description = (await client.get("/openapi.json")).json()
            assert description["servers"] == [{"url": "/krea"}]
            edits = await client.post("/v1/images/edits", headers=KEY)
            assert edits.json()["error"]["code"] == "unsupported_operation"
            missing = await client.get("/nowhere")
            assert missing.status_code == 404
            assert "/krea/nowhere" in missing.json()["error"]["message"]

    asyncio.run(found())


def test_the_page_is_where_its_files_are_beside_it(engine, tmp_path):
    async def moved() -> None:
        async with mounted("/a/krea", engine, tmp_path) as client:
            # Not by the client's base, which ends with a slash.
            answer = await client.get("http://localhost:8000/a/krea")
            assert (answer.status_code, answer.headers["location"]) == (307, "krea/")
            assert "x-request-id" in answer.headers
            page = await client.get("http://localhost:8000/a/krea/")
            assert (page.status_code, page.headers["content-type"][:9]) == (200, "text/html")

    asyncio.run(moved())
