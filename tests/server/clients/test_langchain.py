"""LangChain's DALL-E wrapper, unchanged: it reads URLs."""

import pytest

from tests.server.clients import packages
from tests.server.clients.pictures import from_url
from tests.server.clients.relay import relay
from tests.server.serving import serve

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def fake_server(shared_engine, tmp_path_factory):
    """With the settings of docs/clients.md."""
    flags = ["--engine-endpoints", shared_engine.endpoint]
    flags += ["--default-response-format", "url", "--model-aliases", "dall-e-2"]
    with serve(tmp_path_factory.mktemp("urls"), *flags) as server:
        yield server


def run(url: str, **options: object) -> str:
    client = {"base_url": f"{url}/v1", "api_key": "none", **options}
    return packages.run("python/dalle_wrapper.py", options=client, prompt="a fox")["answer"]


def test_its_answer_is_where_the_picture_is(fake_server, engine):
    url = run(fake_server.url, model="krea-2-turbo", size="64x64")
    assert from_url(url).size == (64, 64)


def test_several_pictures_are_several_lines(fake_server, engine):
    urls = run(fake_server.url, n=2, size="64x64").split("\n")
    assert [from_url(url).size for url in urls] == [(64, 64)] * 2


def test_what_it_sends_is_on_the_page(fake_server, engine, page_bodies):
    """With no option of its own: even its model's name is served, as an alias."""
    with relay(fake_server.url) as relayed:
        run(relayed.url)
    assert relayed.bodies == [page_bodies["LangChain's DALL-E wrapper (reads `url`)"]]
