"""Children of the GPU benchmark: what they find arrives, however they end."""

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress

import pytest

from krea2_bench.gpu import children
from krea2_bench.gpu.children import Child, ChildEnded
from krea2_bench.gpu.rows import Entry
from tests.channel import wait_until

HELLO = {"kind": "hello", "machine": {"device": "none"}}


def end(well: bool = True, usable: bool = True) -> Entry:
    return {"kind": "end", "well": well, "usable": usable}


def child_of(parts: dict[str, Callable[[], object]], receive=lambda entry: None) -> Child:
    """One that sends a row before each part, and ends it well after."""

    def serve(send):
        send(HELLO)

        def run(part: str) -> bool:
            send({"kind": "row", "what": part})
            parts[part]()
            send(end())
            return True

        return run

    return Child(serve, receive)


def where_it_hangs() -> None:
    time.sleep(3600)


def deaf() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    where_it_hangs()


def test_parts_follow_each_other_in_one_child():
    found: list[Entry] = []
    child = child_of({"a": lambda: None, "b": lambda: None}, found.append)
    for part in ("a", "b"):
        child.run(part, 120)
    assert child.alive
    child.close()
    assert not child.alive
    assert [(e["kind"], e.get("part", e.get("what"))) for e in found] == [
        (kind, part) for part in ("a", "b") for kind in ("begin", "row", "done")
    ]


@pytest.mark.parametrize(
    ("crash", "limit_s", "grace_s", "reason"),
    [
        (lambda: os._exit(3), 120, 60, "the child ended with code 3"),
        (lambda: os._exit(0), 120, 60, "the child ended with code 0"),
        (lambda: os.kill(os.getpid(), signal.SIGKILL), 120, 60, "the child was ended by SIGKILL"),
        (lambda: os.abort(), 120, 60, "the child was ended by SIGABRT"),
        (lambda: 1 / 0, 120, 60, "the child ended with code 1"),
        (where_it_hangs, 2, 60, "was ended after 2 s"),
        (deaf, 2, 0.5, "was ended after 2 s"),
    ],
)
def test_a_child_that_ends_leaves_what_it_had_found(monkeypatch, crash, limit_s, grace_s, reason):
    monkeypatch.setattr(children, "GRACE_S", grace_s)
    found: list[Entry] = []
    child = child_of({"a": crash}, found.append)
    child.run("a", limit_s)
    assert not child.alive
    assert [entry["kind"] for entry in found] == ["begin", "row", "missing"]
    assert (found[-1]["why"], found[-1]["reason"]) == ("failed", reason)
    if crash is where_it_hangs:
        assert "in where_it_hangs" in found[-1]["trace"]
    with suppress(ProcessLookupError):
        os.kill(child._pid, 0)
        pytest.fail("it is still there")


def test_a_part_that_fails_is_not_done_and_its_child_may_go_on():
    found: list[Entry] = []

    def serve(send):
        send(HELLO)

        def run(part: str) -> bool:
            send(end(well=False, usable=part == "usable"))
            return part == "usable"

        return run

    child = Child(serve, found.append)
    child.run("usable", 120)
    assert child.alive
    child.run("lost", 120)
    assert not child.alive
    assert [entry["kind"] for entry in found] == ["begin", "begin"]


def test_a_child_that_cannot_begin_says_why():
    def serve(send):
        raise RuntimeError("no driver")

    with pytest.raises(ChildEnded, match=r"ended with code 1(.|\n)*no driver"):
        Child(serve, lambda entry: None)


def test_one_that_was_killed_between_parts_is_not_used_again():
    child = child_of({"a": lambda: None})
    child.run("a", 120)
    os.kill(child._pid, signal.SIGKILL)
    wait_until(lambda: not child.alive)
    child.close()


def test_a_child_ends_with_a_parent_that_is_killed():
    """No GPU stays taken by what nobody reads any more."""
    told, tell = os.pipe()
    parent = os.fork()
    if parent == 0:
        with suppress(BaseException):
            child = child_of({"a": where_it_hangs})
            os.write(tell, f"{child._pid}\n".encode())
            child.run("a", 60)
        os._exit(1)
    pid = int(os.read(told, 100))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    wait_until(lambda: not _runs(pid))


def _runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
