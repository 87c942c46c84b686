"""krea2_srt.testing: processes end as promised, and it is light."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from krea2_srt.testing.processes import ChildProcess, ProcessError
from tests.channel import wait_until

HEAVY = {"torch", "sglang", "fastapi"}

OBEDIENT = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit({code}))
print("ready at 7", flush=True)
time.sleep(600)
"""
STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up", flush=True)
time.sleep(600)
"""
ECHO = "import sys\nfor line in sys.stdin: print(line.strip() * 2, flush=True)"
PARENT = (
    "import subprocess, sys; p = subprocess.Popen(['sleep', '600']); print(p.pid); sys.stdin.read()"
)


def python(code: str, log: Path, **options) -> ChildProcess:
    return ChildProcess([sys.executable, "-u", "-c", code], log / "child.log", **options)


@pytest.mark.parametrize(
    "module", ["processes", "krea2_serve", "fake_engine", "fake_worker", "fake_executor"]
)
def test_it_is_light(module):
    code = f"import sys, krea2_srt.testing.{module}\nsys.exit(bool({HEAVY} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_server_is_waited_for_and_told_to_end(tmp_path):
    with python(OBEDIENT.format(code=0), tmp_path, environment={"PROVED": "yes"}) as process:
        assert process.wait_for_line(re.compile(r"ready at (\d)"), 60)[1] == "7"
        assert Path(f"/proc/{process.pid}/environ").read_bytes().count(b"PROVED=yes") == 1
        assert not process.ended
    assert process.ended


def test_another_exit_code_than_the_promised_one_is_an_error(tmp_path):
    with (
        pytest.raises(ProcessError, match=r"child ended with exit code 3; .*\nready at 7"),
        python(OBEDIENT.format(code=3), tmp_path) as process,
    ):
        process.wait_for_line(re.compile("ready"), 60)
    with python(OBEDIENT.format(code=3), tmp_path, exit_code=3) as process:
        process.wait_for_line(re.compile("ready"), 60)


def test_the_error_of_the_block_is_not_hidden_by_that_of_the_process(tmp_path):
    with pytest.raises(KeyError), python(OBEDIENT.format(code=3), tmp_path) as process:
        process.wait_for_line(re.compile("ready"), 60)
        raise KeyError
    assert process.ended


def test_what_ends_while_it_is_waited_for_is_told_with_its_log(tmp_path):
    with (
        pytest.raises(ProcessError, match=r"exit code 1, and this never was: (?s:.*)bad weights"),
        python("raise SystemExit('bad weights')", tmp_path) as process,
    ):
        process.wait_for_line(re.compile("ready"), 60)


def test_what_never_is_ready_is_waited_for_no_longer_than_told(tmp_path):
    with (
        pytest.raises(ProcessError, match="did not get there within 0 s: it is up"),
        python(OBEDIENT.format(code=0), tmp_path) as process,
    ):
        process.wait_until(lambda: False, "it is up", 0)


def test_what_does_not_end_is_killed_which_is_an_error(tmp_path):
    with (
        pytest.raises(ProcessError, match=r"did not end within 0\.1 s"),
        python(STUBBORN, tmp_path, end_s=0.1) as process,
    ):
        process.wait_for_line(re.compile("up"), 60)
    assert process.wait() == -signal.SIGKILL


def test_unless_it_may_end_as_it_likes(tmp_path):
    with python(STUBBORN, tmp_path, exit_code=None, end_s=0.1) as process:
        process.wait_for_line(re.compile("up"), 60)
    assert process.wait() == -signal.SIGKILL


def test_a_process_that_talks_ends_with_its_stdin(tmp_path):
    with python(ECHO, tmp_path, talks=True) as process:
        process.send_line("ab")
        assert process.read_line(60) == "abab"
    assert process.wait() == 0


def test_one_that_says_nothing_is_an_error(tmp_path):
    with (
        pytest.raises(ProcessError, match="child failed"),
        python("import time; time.sleep(600)", tmp_path, talks=True) as process,
    ):
        process.read_line(0.1)


def test_all_that_it_has_started_ends_with_one_that_runs_apart(tmp_path):
    with python(PARENT, tmp_path, talks=True, apart=True) as process:
        grandchild = int(process.read_line(60))
        assert os.getpgid(grandchild) == process.pid
    wait_until(lambda: _is_over(grandchild))


def _is_over(pid: int) -> bool:
    """Whether it has ended, if nobody has reaped it yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(") ", 1)[1][0] in "ZX"
    except FileNotFoundError:
        return True


def test_a_job_that_fails_is_told(tmp_path):
    with (
        pytest.raises(ProcessError, match="child failed"),
        python("raise SystemExit(4)", tmp_path) as process,
    ):
        process.finish(60)


def test_a_command_that_is_not_there_is_an_error_of_the_file_system(tmp_path):
    with pytest.raises(FileNotFoundError), ChildProcess(["/no-such-command"], tmp_path / "log"):
        pass
