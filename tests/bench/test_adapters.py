"""The benchmark of adapters: its files, its order, and what it says of what it found."""

import threading
import time

import pytest

from krea2_bench.adapters.files import write_adapter
from krea2_bench.adapters.table import figures, table
from krea2_bench.adapters.tenants import by_request, by_switching, latencies
from krea2_srt.lora.reader import read_adapter
from krea2_srt.model.dit_files import read_config

RUN = {"command": "python -m x", "date": "2026-11-30T00:00:00", "cpu_count": 2, "cpu": "a CPU"}
FOUND = {
    "run": RUN,
    "packs": {"without": [10.0, 10.0, 20.0], "with": [11.0, 12.0, 26.0]},
    "first": {"disk": [100.0, 110.0, 120.0], "device": [90.0, 90.0, 90.0]},
    "base": {"with adapters about": [5.0, 5.0, 6.0], "without": [5.0, 5.0, 5.0]},
    "tenants": {
        "likeness_db": {"same adapter": [50.1, 51.0], "another adapter": 20.0, "no adapter": 19.0},
        "interval_s": 0.5,
        "sequential_s": [0.5],
        "ours": [0.1] * 19 + [0.2],
        "sglang": [1.0] * 18 + [2.0] * 2,
    },
}


def test_its_adapters_are_those_of_all_readers(demo_model, tmp_path):
    config = read_config(demo_model / "transformer")
    found = []
    for seed in (0, 1):
        file = tmp_path / f"{seed}.safetensors"
        write_adapter(demo_model / "transformer", file, seed)
        found.append(read_adapter(file, config))
    assert found[0].rank == 16
    assert found[0].digest != found[1].digest
    assert not [name for name in found[0].matrices if name.startswith(("text_fusion", "time"))]
    assert len(found[0].matrices) > 10


def test_the_table_says_what_was_found():
    text = figures(FOUND)
    assert "| 1.20 (1.10 to 1.30) | at most 1.25 |" in text
    assert "| 20.0 (10.0 to 30.0) | at most 50 |" in text
    assert "| 1.00 (1.00 to 1.20) | 1 |" in text
    assert "| 0.05 | at most 0.25 |" in text
    assert "50.1 and 51.0 dB from ours with the same adapter" in table(FOUND)


class Server:
    """Takes the place of a client; nothing may come between a switch and its picture."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self._set = ""
        self._busy = threading.Lock()

    def set_adapter(self, name: str, path: str) -> None:
        assert self._busy.acquire(blocking=False), "somebody else has not got a picture yet"
        self._set = name

    def picture(self, adapter: str | None = None, seed: int = 0) -> None:
        self.asked.append((adapter or self._set, seed))
        time.sleep(0.002)
        if adapter is None:
            self._busy.release()


@pytest.mark.parametrize("ours", [True, False])
def test_tenants_take_turns_and_none_comes_between(ours, tmp_path):
    server = Server()
    files = [tmp_path / f"{name}.safetensors" for name in "abc"]
    if ours:
        generate = by_request(server, [file.stem for file in files])
    else:
        generate = by_switching(server, files)
    found = latencies(generate, 12, 0.001)
    assert sorted(server.asked) == sorted(("abc"[n % 3], n) for n in range(12))
    assert len(found) == 12
    assert min(found) > 0
