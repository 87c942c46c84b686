"""The Ray Serve benchmark's arithmetic; the application is tested in tests/unit/deploy/ray."""

import os
import subprocess
import sys
import time

import psutil
import pytest

from benchmarks.ray_serve.__main__ import table
from benchmarks.ray_serve.quota import limited

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


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, for control groups")
def test_a_limited_process_gets_its_part_of_a_core():
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as busy:
        try:
            with limited([busy.pid], 0.25):
                process = psutil.Process(busy.pid)
                time.sleep(0.2)
                before, start = sum(process.cpu_times()[:2]), time.monotonic()
                time.sleep(1.5)
                used = sum(process.cpu_times()[:2]) - before
                assert used / (time.monotonic() - start) == pytest.approx(0.25, rel=0.3)
        except OSError as error:
            pytest.skip(f"no control groups can be made here: {error}")
        finally:
            busy.kill()
