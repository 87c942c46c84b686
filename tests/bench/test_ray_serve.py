"""The Ray Serve benchmark's arithmetic; the application is tested in tests/unit/deploy/ray."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from krea2_bench.ray_serve.__main__ import table
from krea2_bench.ray_serve.quota import limited
from tests.channel import wait_until

ROOTS = (Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup"))

MADE = {"command": "x", "date": "2026-01-01T00:00:00+00:00", "cpu_count": 2}


def test_the_table_says_the_ratios():
    rounds = [
        {"router": "work", "latency_s": {"64x64": [1.0] * 19 + [3.0], "128x128": [6.0]}},
        {"router": "round_robin", "latency_s": {"64x64": [1.0] * 19 + [8.0], "128x128": [12.0]}},
    ]
    results = {
        "scaling": {
            "provenance": MADE,
            "mix": "m",
            "requests_per_s": {"1": [1.0, 1.1], "2": [1.9, 2.1]},
        },
        "routing": {
            "provenance": MADE,
            "mix": "m",
            "load": 0.6,
            "requests_per_s": 1.5,
            "rounds": rounds,
        },
    }
    text = table(results)
    assert "Ratio of the means: **1.90**" in text
    assert "| 128x128 | 6.00 | 12.00 | 0.50 | 6.00 | 12.00 |" in text
    assert "| all | 3.00 | 8.00 | 0.38 | 1.00 | 1.00 |" in text
    assert "round by round: 0.38 (" in text
    del results["routing"]
    assert "Routing" not in table(results)


def num_throttled(group: Path) -> int:
    """How often the kernel has made it wait for the rest of a period."""
    return int(re.search(r"nr_throttled (\d+)", (group / "cpu.stat").read_text())[1])


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for control groups")
def test_a_limited_process_gets_its_part_of_a_core():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            with limited([busy.pid], 0.25):
                (group,) = (folder for root in ROOTS for folder in root.glob(f"krea2-{busy.pid}"))
                wait_until(lambda: num_throttled(group) > 10)
                text = "".join(file.read_text() for file in group.glob("cpu.*max"))
                text += "".join(file.read_text() for file in group.glob("cpu.cfs_*_us"))
                assert {"5000", "20000"} <= set(text.split())
        except OSError as error:
            pytest.skip(f"no control groups can be made here: {error}")
        finally:
            busy.kill()
