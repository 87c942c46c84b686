"""The adapters of a folder by name: read beside the loop, found again, replaced, taken away."""

import os
import shutil
from pathlib import Path
from random import Random

import pytest
import torch

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.cost import roofline
from krea2_srt.engine.engine import Engine
from krea2_srt.engine.lifecycle import Request, State
from krea2_srt.errors import AdapterError, RequestError, UnknownAdapterError
from krea2_srt.lora.library import FRESH_S, AdapterLibrary
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.request import AdapterChoice, AdapterUse, ImageRequest
from krea2_srt.runner.executor import RunnerExecutor
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.testing.fake_executor import VirtualClock
from tests.channel import wait_until
from tests.comparisons import CPU
from tests.torch.lora.forms import FORMS, random_pairs

NAMES = "abcdefghi"


@pytest.fixture(scope="module")
def files(config, tmp_path_factory) -> list[Path]:
    """Ten different ones, of equal size."""
    found = []
    for seed in range(10):
        folder = tmp_path_factory.mktemp(str(seed))
        found.append(FORMS[0].write(random_pairs(config, rank=4, seed=seed), folder))
    return found


@pytest.fixture(scope="module")
def loaded(demo_model) -> Krea2Runner:
    return Krea2Runner.load(Krea2Checkpoint.from_folder(demo_model), CPU, torch.float32)


class Served:
    """A library on a folder of its own, and a clock that its tests move."""

    def __init__(self, runner: Krea2Runner, folder: Path, files: list[Path], **sizes: int) -> None:
        self.files = files
        self.folder = folder
        self.clock = VirtualClock()
        self.pool = runner.adapters = AdapterPool(runner.dit, **sizes)
        self.library = AdapterLibrary(folder, self.pool, runner.dit, self.clock)

    def put(self, name: str, number: int) -> None:
        """An adapter's file, replaced at once."""
        target = self.folder / f"{name}.safetensors"
        target.parent.mkdir(exist_ok=True)
        shutil.copy(self.files[number], self.folder / "new")
        os.replace(self.folder / "new", target)

    def age(self) -> None:
        """All files have to be looked at again."""
        self.clock.advance(2e3 * FRESH_S)

    def wait(self, awaited):
        wait_until(lambda: awaited.done, poll_s=0.002)
        self.library.collect()
        return awaited.result()

    def ask(self, name: str, scale: float | None = None) -> AdapterUse:
        (use,), _ = self.wait(self.library.ask([AdapterChoice(name, scale)]))
        return use

    def list(self):
        listing = self.library.listing()
        wait_until(listing.done, poll_s=0.002)
        return {info.name: info for info in self.library.infos(listing)}


@pytest.fixture
def served(loaded, files, tmp_path):
    served = Served(loaded, tmp_path, files)
    for number, name in enumerate(NAMES[:3]):
        served.put(name, number)
    yield served
    served.library.close()


def test_one_is_read_once_and_found_at_once_then(served):
    first = served.library.ask([AdapterChoice("a")])
    second = served.library.ask([AdapterChoice("a", 0.5)])
    (use,), held = served.wait(first)
    assert second.done, "they wait for the same file"
    assert {one.scale for one in second.result()[0]} == {0.5}
    assert served.pool.reads == 1
    assert served.library.ask([AdapterChoice("a")]).done, "nothing is looked at"
    served.age()
    assert served.ask("a").digest == use.digest
    assert served.pool.reads == 1, "it has not changed"
    assert served.pool.find([use]).uses[0][0].digest == held[0].digest


def test_one_that_is_asked_for_stays_until_it_is_used(served):
    served.pool.on_host.max_bytes = served.pool.on_device.max_bytes = 0
    (use,), held = served.wait(served.library.ask([AdapterChoice("a")]))
    for name in "bc":
        served.ask(name)
    assert served.pool.find([use]).uses[0][0].digest == use.digest
    assert served.pool.reads == 3, "it was not read again in the engine's turn"
    assert held[0].digest == use.digest


def test_a_replaced_file_is_another_adapter(served):
    before = served.ask("a")
    served.put("a", 7)
    assert served.ask("a").digest == before.digest, "it was looked at just now"
    served.age()
    after = served.ask("a")
    assert after.digest != before.digest
    assert served.pool.find([before, after]), "what has begun with the old one ends with it"


def test_names_come_and_go(served):
    with pytest.raises(UnknownAdapterError, match="'d' is not served"):
        served.ask("d")
    served.put("d", 3)
    served.put("acme/d", 4)
    assert served.ask("d").digest != served.ask("acme/d").digest
    (served.folder / "d.safetensors").unlink()
    served.age()
    with pytest.raises(UnknownAdapterError):
        served.ask("d")
    assert set(served.list()) == {"a", "b", "c", "acme/d"}


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", "a/../b", "", "x:y"])
def test_a_name_that_leads_elsewhere_is_unknown(name, served):
    with pytest.raises(UnknownAdapterError):
        served.ask(name)


def test_other_names_are_given_and_taken_away(served):
    library = served.library
    use = served.ask("a")
    served.wait(library.read("z", "a.safetensors"))
    info = library.serve("z", "a.safetensors")
    assert (info.name, info.digest, info.rank) == ("z", use.digest, 4)
    assert served.ask("z").digest == use.digest
    assert set(served.list()) == {"a", "b", "c", "z"}
    library.unload("a")
    with pytest.raises(UnknownAdapterError):
        served.ask("a")
    assert set(served.list()) == {"b", "c", "z"}
    with pytest.raises(UnknownAdapterError):
        library.unload("a")
    served.wait(library.read("a", ""))
    library.serve("a", "")
    assert served.ask("a").digest == use.digest
    library.unload("z")
    assert set(served.list()) == {"a", "b", "c"}


def test_a_name_is_given_once(served):
    served.ask("a")
    served.ask("b")
    with pytest.raises(RequestError, match="lora_name: 'b' is another adapter's; unload"):
        served.library.read("b", "a")
    with pytest.raises(RequestError, match=r"lora_path: '\.\./x' cannot be an adapter's"):
        served.library.read("z", "../x")


def test_what_is_wrong_is_known_until_it_is_mended(served):
    file = served.folder / "broken.safetensors"
    file.write_bytes(b"x")
    for _ in range(2):
        with pytest.raises(AdapterError, match=r"^adapter broken: the file is damaged"):
            served.ask("broken")
    assert "damaged" in served.list()["broken"].error
    served.put("broken", 5)
    assert served.ask("broken").digest
    assert served.list()["broken"].error == ""


def test_a_card_is_read_with_it(served):
    card = served.folder / "a.yaml"
    card.write_text("title: An a\ndefault_scale: 0.5\n")
    assert served.ask("a").scale == 0.5
    assert served.ask("a", 2.0).scale == 2.0
    assert served.list()["a"].title == "An a"
    card.write_text("colour: brown\n")
    served.age()
    with pytest.raises(AdapterError, match=r"a\.yaml: 'colour' is not known; title, trigger_words"):
        served.ask("a")
    card.unlink()
    assert served.ask("a").scale == 1.0


def test_where_each_is_told(served):
    use = served.ask("a")
    served.ask("b")
    served.pool.find([use])
    assert {name: info.where for name, info in served.list().items()} == {
        "a": "device",
        "b": "host",
        "c": "disk",
    }
    assert set(served.library.statistics()) == {"a", "b"}
    assert served.library.statistics()["a"] == ("device", served.files[0].stat().st_size)


@pytest.mark.parametrize(("seed", "places"), [(0, 8), (1, 4), (2, 3)])
def test_nine_adapters_on_fewer_places_whatever_happens(seed, places, loaded, files, tmp_path):
    """Arrivals, cancels, unloads and replaced files: every picture is that of its own adapter."""
    choose = Random(seed)
    size = AdapterPool(loaded.dit).load(files[0]).nbytes
    served = Served(loaded, tmp_path, files, max_bytes=places * size, max_host_bytes=3 * size)
    for number, name in enumerate(NAMES):
        served.put(name, number)
    executor = RunnerExecutor(loaded)
    engine = Engine(executor, roofline(), EngineConfig(max_active_sequences=32))
    asked: dict[Request, AdapterUse | None] = {}
    pictures = {}

    def arrive() -> None:
        name = choose.choice([*NAMES, None, None])
        uses, held = frozenset(), ()
        if name is not None:
            uses, held = served.wait(served.library.ask([AdapterChoice(name)]))
        image = ImageRequest("x", 32, 32, 2, seed=choose.randrange(3), adapters=uses)
        request = engine.submit(str(len(asked)), [image])
        asked[request] = held

    def turn() -> None:
        events = engine.turn()
        begun = [r for r in engine.requests.values() if r.state is not State.WAITING]
        there = {digest for request in begun for digest in request.adapters}
        assert served.pool.fit(there)
        assert served.pool.on_device.nbytes <= places * size
        for event in events or ():
            request = getattr(event, "request", None)
            if request is not None and request.ended:
                asked[request] = None
                found = executor.take_pixels(request.sequences[0])
                if request.state is State.DONE:
                    pictures[request] = found

    for _ in range(150):
        match choose.randrange(12):
            case 0 | 1 | 2 | 3 | 4:
                arrive()
            case 5 if engine.requests:
                engine.cancel(choose.choice(list(engine.requests)))
            case 6:
                served.put(choose.choice(NAMES), choose.randrange(10))
                served.age()
            case 7:
                served.age()
            case _:
                turn()
    while not engine.idle:
        turn()
    assert executor.empty
    assert len(pictures) > 30
    assert served.pool.on_device.evictions > 0 or places == 8
    pool = served.pool
    assert pool.uploads - pool.on_device.evictions >= len(pool.on_device)
    alone = {}
    for path in files:
        pool.load(path)  # wherever their files are now
    for request, picture in pictures.items():
        image = request.images[0]
        if image not in alone:
            engine.submit("alone", [image])
            again = engine.requests["alone"]
            while not again.ended:
                engine.turn()
            alone[image] = executor.take_pixels(again.sequences[0]).astype(int)
        assert abs(picture.astype(int) - alone[image]).max() <= 1, image
    served.library.close()
