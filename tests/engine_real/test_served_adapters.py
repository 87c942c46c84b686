"""Adapters on the real engine: by krea2-serve's requests, and by SGLang's own endpoints."""

import base64
import contextlib
import io
import os
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from random import Random

import httpx
import numpy as np
import pytest
from PIL import Image

from krea2_srt.lora.library import FRESH_S
from krea2_srt.request import AdapterUse, ImageRequest
from tests.channel import endpoints, statistics, wait_until
from tests.engine_real.test_right_pictures import RIGHT
from tests.torch.demo.test_sepia import WISHES
from tools.demo_model.captions import caption
from tools.demo_model.judge import judge, look
from tools.demo_model.sepia import distance_from_sepia

PROMPT, SIZE, SEED = "a red circle above a blue square", "96x64", 11


@pytest.fixture(scope="module")
def written(trained_model: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters, which change pictures, in different forms and of different ranks."""
    from krea2_srt.model.dit_files import dit_config
    from tests.torch.lora.forms import FORMS, random_pairs

    config = dit_config(trained_model / "transformer")
    found = {}
    for seed, name in enumerate(("one", "two", "three", "four", "other")):
        folder = tmp_path_factory.mktemp(name)
        pairs = random_pairs(config, rank=2 + seed, alpha=0.5, seed=seed)
        found[name] = FORMS[seed].write(pairs, folder)
    return found


@pytest.fixture
def folder(adapters_folder: Path, written: dict[str, Path]) -> Path:
    """The engine's folder with four of them, and nothing else."""
    for file in adapters_folder.iterdir():
        shutil.rmtree(file) if file.is_dir() else file.unlink()
    for name in ("one", "two", "three", "four"):
        put(written[name], adapters_folder, name)
    return adapters_folder


def put(source: Path, folder: Path, name: str) -> None:
    """Replace an adapter as one should: at once."""
    if source.is_dir():
        shutil.copytree(source, folder / name)
        return
    shutil.copy(source, folder / f"{name}.new")
    os.replace(folder / f"{name}.new", folder / f"{name}.safetensors")


def pixels(response: httpx.Response) -> np.ndarray:
    assert response.status_code == 200, response.text
    data = base64.b64decode(response.json()["data"][0]["b64_json"])
    return np.asarray(Image.open(io.BytesIO(data))).astype(int)


def draw(server, **fields) -> np.ndarray:
    return pixels(server.post(**{"prompt": PROMPT, "size": SIZE, "seed": SEED, **fields}))


def engine(server) -> dict:
    (endpoint,) = endpoints(server.log)
    return statistics(endpoint)


def farthest(one: np.ndarray, other: np.ndarray) -> int:
    return int(np.abs(one - other).max())


def test_pictures_are_those_of_the_model_with_the_adapters(real_server, runner, folder, written):
    from krea2_srt.runner.generation import Generation

    uses = [
        AdapterUse(name, runner.adapters.load(written[name]).digest, scale)
        for name, scale in (("one", 0.7), ("two", -0.4))
    ]
    width, height = map(int, SIZE.split("x"))
    image = ImageRequest(PROMPT, width, height, 8, seed=SEED, adapters=frozenset(uses))
    generation = Generation(runner, [image])
    while generation.pending:
        for pack in generation.packs(10_000):
            generation.step(pack)
    expected = generation.pixels(generation.states[0]).astype(int)
    found = draw(real_server, lora=[{"name": use.name, "scale": use.scale} for use in uses])
    assert farthest(found, expected) <= 1
    assert farthest(found, draw(real_server)) > 50, "they change it"
    assert farthest(draw(real_server, lora="one:0"), draw(real_server)) == 0


def test_each_of_many_at_once_has_its_own(real_server, server, folder):
    kinds = [None, "one", "two:0.5", "three", "four,one:0.3", "one:-0.5"]
    alone = [draw(real_server, lora=kind) for kind in kinds]
    before = engine(server)
    with ThreadPoolExecutor(24) as pool:
        found = list(pool.map(lambda i: (i, draw(real_server, lora=kinds[i % 6])), range(24)))
    after = engine(server)
    for number, picture in found:
        assert farthest(picture, alone[number % 6]) <= 2, kinds[number % 6]
    packs, steps = (after[key] - before[key] for key in ("packs", "steps"))
    assert steps / packs > 4, "different adapters share packs"
    assert after["adapter_reads"] == before["adapter_reads"], "they were there"


def test_a_file_that_comes_changes_or_goes_needs_no_restart(real_server, folder, written):
    assert real_server.post(prompt=PROMPT, size=SIZE, lora="other").status_code == 400
    put(written["other"], folder, "other")
    other = draw(real_server, lora="other")
    one = draw(real_server, lora="one")
    put(written["other"], folder, "one")
    wait_until(lambda: farthest(draw(real_server, lora="one"), other) <= 1)
    assert farthest(one, other) > 20
    (folder / "one.safetensors").unlink()
    time.sleep(FRESH_S)
    assert real_server.post(prompt=PROMPT, size=SIZE, lora="one").status_code == 400
    names = {one["name"] for one in real_server.get("/v1/loras").json()["data"]}
    assert names == {"two", "three", "four", "other"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is damaged"),
        (b"\xff" * 64, "the file's header has"),
        (b"PK\x03\x04" + b"\xff" * 64, "this is a pickle under another name"),
    ],
)
def test_a_broken_file_harms_nobody(content, message, real_server, folder):
    (folder / "broken.safetensors").write_bytes(content)
    expected = draw(real_server, lora="two")
    with ThreadPoolExecutor(4) as pool:
        good = pool.submit(draw, real_server, lora="two")
        bad = [pool.submit(real_server.post, prompt=PROMPT, lora="broken") for _ in range(3)]
        for answer in (one.result() for one in bad):
            error = answer.json()["error"]
            assert (answer.status_code, error["code"]) == (500, "adapter_failed")
            assert error["message"].startswith("adapter broken: ")
            assert message in error["message"]
            assert str(folder) not in error["message"]
        assert farthest(good.result(), expected) <= 1
    listed = {one["name"]: one for one in real_server.get("/v1/loras").json()["data"]}
    assert message in listed["broken"]["error"]


def test_links_lead_nowhere_else(real_server, folder, written, tmp_path):
    shutil.copy(written["one"], tmp_path / "secret.safetensors")
    (folder / "out.safetensors").symlink_to(tmp_path / "secret.safetensors")
    answer = real_server.post(prompt=PROMPT, size=SIZE, lora="out")
    assert "is a link that leads out of the folder" in answer.json()["error"]["message"]


def test_a_card_says_the_default(real_server, folder):
    (folder / "two.yaml").write_text("title: Two\ntrigger_words: [zwei]\ndefault_scale: 0.25\n")
    time.sleep(FRESH_S)
    answer = real_server.post(prompt=PROMPT, size=SIZE, seed=SEED, lora="two")
    assert answer.json()["lora"][0]["scale"] == 0.25
    assert farthest(pixels(answer), draw(real_server, lora="two:0.25")) <= 1
    (folder / "two.yaml").write_text("default_scale: strong\n")
    time.sleep(FRESH_S)
    error = real_server.post(prompt=PROMPT, size=SIZE, lora="two").json()["error"]
    assert error["message"] == (
        "adapter two: two.yaml: default_scale: the scale of the adapter must be a finite number, "
        "got 'strong'"
    )
    (folder / "two.yaml").unlink()
    wait_until(lambda: real_server.post(prompt=PROMPT, size=SIZE, lora="two").status_code == 200)


def test_who_hangs_up_while_an_adapter_is_read_leaves_nothing(real_server, server, folder):
    for _ in range(8):
        (folder / "four.safetensors").touch()
        with contextlib.suppress(httpx.TimeoutException):
            httpx.post(
                f"{real_server.url}/v1/images/generations",
                json={"prompt": PROMPT, "size": SIZE, "lora": "four"},
                timeout=0.02,
            )

    def balanced() -> bool:
        found = engine(server)
        ended = found["done"] + found["failed"] + found["cancelled"]
        return found["requests"] == 0 and ended == found["accepted"]

    wait_until(balanced)
    draw(real_server, lora="four")


def test_sepia_is_where_it_was_asked_for_and_nowhere_else(real_server, folder, trained_model):
    """32 at once: colours as the prompts say, or brown, each as its own request says."""
    for file in (trained_model / "loras").iterdir():
        shutil.copy(file, folder)
    prompts = [caption(wish, Random(1)) for wish in WISHES]

    def ask(number: int) -> np.ndarray:
        lora = {"lora": [{"name": "sepia"}]} if number % 2 else {}
        fields = {"prompt": prompts[number // 2 % 4], "size": "128x128", "seed": number // 8}
        return pixels(real_server.post(**fields, **lora)).astype(np.uint8)

    with ThreadPoolExecutor(32) as pool:
        pictures = list(pool.map(ask, range(32)))
    for number, picture in enumerate(pictures):
        wish = WISHES[number // 2 % 4]
        if number % 2:
            assert distance_from_sepia(picture) < 40, number
            assert [thing.shape for thing in look(picture).things] == [wish.asked[0].shape], number
        else:
            assert distance_from_sepia(picture) > 60, number
            assert judge(picture, wish) == RIGHT, number


# SGLang's own endpoints.


def sglang(server, path: str, **fields) -> httpx.Response:
    url = f"http://127.0.0.1:{server.port}/v1/{path}"
    if not fields and path == "list_loras":
        return httpx.get(url, timeout=60)
    return httpx.post(url, json=fields, timeout=60)


def by_sglang(server, **fields) -> np.ndarray:
    (picture,) = server.generate(
        prompt=PROMPT, size=SIZE, seed=SEED, num_inference_steps=8, **fields
    )
    return picture.astype(int)


@pytest.fixture
def unset(server):
    yield
    sglang(server, "unmerge_lora_weights")


def test_sglangs_endpoints_set_what_all_its_requests_have(server, real_server, folder, unset):
    base, one = by_sglang(server), draw(real_server, lora="one")
    assert sglang(server, "set_lora", lora_nickname="one").status_code == 200
    found = by_sglang(server)
    assert farthest(found, one) <= 1
    assert farthest(draw(real_server), base) <= 1, "ours say what they want"
    sglang(server, "unmerge_lora_weights", target="all")
    assert farthest(by_sglang(server), base) == 0
    sglang(server, "merge_lora_weights", strength=0.5)
    assert farthest(by_sglang(server), draw(real_server, lora="one:0.5")) <= 1
    path = str(folder / "two.safetensors")
    answer = sglang(
        server, "set_lora", lora_nickname=["x", "one"], lora_path=[path, None], strength=[0.4, 0.2]
    )
    assert answer.status_code == 200, answer.text
    assert farthest(by_sglang(server), draw(real_server, lora="two:0.4,one:0.2")) <= 2
    status = sglang(server, "list_loras").json()
    assert {it["nickname"] for it in status["loaded_adapters"]} == {"x", "one"}
    assert status["active"]["transformer"][0]["nicknames"] == ["one", "x"]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_nickname": "nope"}, "'nope' is not"),
        ({"lora_nickname": "x", "lora_path": "/etc/passwd"}, "is not in the folder of adapters"),
        ({"lora_nickname": "x", "lora_path": "krea/some-lora"}, "is not in the folder of adapters"),
        ({"lora_nickname": "one", "target": "critic"}, "target: must be all or transformer"),
        ({"lora_nickname": "one", "strength": 99}, "the scale of one must be between"),
        ({"lora_nickname": ["one", "one"]}, "must be different names"),
        ({"lora_nickname": ["one", "two"], "strength": [1.0]}, "must be as many as"),
        ({"lora_nickname": "one", "lora_alpha": 4}, "lora_alpha: "),
    ],
)
def test_what_sglangs_endpoints_cannot_do_is_said(fields, message, server, folder, unset):
    base = by_sglang(server)
    answer = sglang(server, "set_lora", **fields)
    assert answer.status_code == 500  # SGLang's own for all of these
    assert message in answer.json()["detail"]
    assert farthest(by_sglang(server), base) == 0
