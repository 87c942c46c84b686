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
from krea2_srt.lora import library as library_module
from krea2_srt.lora.files import UnreadableError
from krea2_srt.lora.library import FRESH_S, AdapterLibrary
from krea2_srt.lora.pool import AdapterPool
from krea2_srt.messages import SetAdapterNames
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
        self.age()
        listing = self.library.listing()
        wait_until(listing.done, poll_s=0.002)
        return {info.name: info for info in self.library.infos(listing)}

    def load(self, name: str, path: str = ""):
        read = self.library.read(name, path)
        wait_until(lambda: read.done, poll_s=0.002)
        self.library.collect()
        return self.library.serve(name, path, read)


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
    info = served.load("z", "a.safetensors")
    assert (info.name, info.digest, info.rank) == ("z", use.digest, 4)
    assert served.ask("z").digest == use.digest
    assert set(served.list()) == {"a", "b", "c", "z"}
    library.unload("a")
    with pytest.raises(UnknownAdapterError):
        served.ask("a")
    assert set(served.list()) == {"b", "c", "z"}
    served.load("a")
    assert served.ask("a").digest == use.digest
    library.unload("z")
    assert set(served.list()) == {"a", "b", "c"}


def test_a_name_is_given_once(served):
    with pytest.raises(RequestError, match="lora_name: 'b' is another adapter's; unload"):
        served.load("b", "a")  # whether anybody has asked for it or not
    served.load("z", "a")
    with pytest.raises(RequestError, match="lora_name: 'z' is another adapter's; unload"):
        served.load("z", "b")
    with pytest.raises(RequestError, match="lora_path: there is no adapter 'nope' in the folder"):
        served.load("y", "nope")
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


def test_names_that_are_told_need_no_files_and_never_mean_others(served):
    use = served.ask("b")
    names = SetAdapterNames(frozenset({("z", "a"), ("y", "gone"), ("c", "gone")}), frozenset({"b"}))
    served.library.set_names(names)
    assert served.ask("z").digest == served.ask("a").digest != use.digest
    for name in ("y", "b", "c"):
        with pytest.raises(UnknownAdapterError):
            served.ask(name)
    assert set(served.list()) == {"a", "z"}, "c is not the folder's own again"


def test_what_passes_is_not_kept_for_an_error(served, monkeypatch):
    def fails(*args, **kwargs):
        raise UnreadableError("adapter a: it cannot be read: Permission denied")

    with monkeypatch.context() as patched:
        patched.setattr(library_module, "read_adapter", fails)
        with pytest.raises(AdapterError, match="Permission denied"):
            served.ask("a")
    assert served.ask("a").digest


def test_an_error_names_what_was_asked_for(served):
    (served.folder / "secret.safetensors").write_bytes(b"x")
    served.library.set_names(SetAdapterNames(frozenset({("z", "secret")})))
    with pytest.raises(AdapterError, match=r"^adapter z: the file is damaged"):
        served.ask("z")
    assert "secret" not in served.list()["z"].error


def test_equal_files_are_one_adapter_on_the_host(served):
    served.put("copy", 0)
    first, second = (
        served.library.ask([AdapterChoice("a")]),
        served.library.ask([AdapterChoice("copy")]),
    )
    held = [served.wait(one)[1][0] for one in (first, second)]
    assert held[0] is held[1]
    assert served.pool.reads == 1


def test_a_request_may_be_first_to_look_at_what_was_read(served):
    awaited = served.library.ask([AdapterChoice("a")])
    wait_until(lambda: awaited.done, poll_s=0.002)
    (use,), _ = awaited.result()
    assert served.pool.find([use]), "whoever collects it later"
    served.pool.on_device.max_bytes = 0
    assert not served.pool.fit([use.digest]), "its size is known by then"


def test_cards_that_are_none_are_told(served):
    card = served.folder / "a.yaml"
    os.mkfifo(card)
    with pytest.raises(AdapterError, match=r"^adapter a: a\.yaml is no file"):
        served.ask("a")
    card.unlink()
    card.write_text("? 0x" + "f" * 6000 + "\n: 1\n")
    served.age()
    with pytest.raises(AdapterError, match=r"a\.yaml: a int is not known"):
        served.ask("a")
    assert served.list()["a"].error.startswith("adapter a: a.yaml: ")
    card.write_text("x: " + "[" * 9000)
    assert "more than 8192 bytes" in served.list()["a"].error


def test_unknown_names_leave_nothing(served):
    for number in range(50):
        with pytest.raises(UnknownAdapterError):
            served.ask(f"unknown-{number}")
    assert len(served.library._looked) == len(served.library._known) == 0
