"""What the log says of a start."""

import subprocess
import sys

from krea2_srt.read_ahead import ReadAheadReport
from krea2_srt.start_up import StartUp, process_age_s


def test_the_stages_of_a_start_in_a_line():
    start_up = StartUp(31.04, 40.0, ReadAheadReport(33_400_000_000, 28.0, 0.2))
    assert start_up.text(43.1) == (
        "ready 43.1 s after its process began: imports 31.0 s, loading 9.0 s (0.2 s of it waiting "
        "for files), warm-up 3.1 s; beside them 33.40 GB were read in 28.0 s (1.19 GB/s)"
    )


def test_nothing_read_has_no_rate():
    assert StartUp(1.0, 2.0, ReadAheadReport(0, 0.0, 0.0)).text(3.0).endswith("read in 0.0 s")


def test_a_child_is_younger_than_its_parent():
    code = "from krea2_srt.start_up import process_age_s; print(process_age_s())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < float(done.stdout) < process_age_s()
