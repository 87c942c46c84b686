"""No test asserts how long something took: it would be about what else the machine does.

A promise is proved by an order of events, a count, a state, or a wait that ends late; speeds are
ratios in `make bench-check`. This finds what a reader would: comparisons of a clock, or of a
difference of two of its readings, in the function that has read it.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
CLOCKS = {"monotonic", "perf_counter", "time", "process_time", "monotonic_ns", "perf_counter_ns"}

ALLOWED = {
    ("channel.py", "wait_until"): "the end of a wait, which is five minutes off",
}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def reads_clock(node: ast.AST, stamps: set[str] = frozenset()) -> bool:
    for part in ast.walk(node):
        match part:
            case ast.Call(func=ast.Attribute(attr=name) | ast.Name(id=name)) if name in CLOCKS:
                return True
            case ast.Name(id=name) if name in stamps:
                return True
    return False


def is_span(node: ast.AST, stamps: set[str]) -> bool:
    differences = (part for part in ast.walk(node) if isinstance(part, ast.BinOp))
    return any(isinstance(one.op, ast.Sub) and reads_clock(one, stamps) for one in differences)


def names_of(function: Function) -> tuple[set[str], set[str]]:
    """Names of readings of a clock, and of their differences, single or in lists."""
    stamps: set[str] = set()
    spans: set[str] = set()
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.Call() as value):
                if reads_clock(value):
                    stamps.add(name)
    for node in ast.walk(function):
        match node:
            case ast.Assign(targets=[ast.Name(id=name)], value=value) if is_span(value, stamps):
                spans.add(name)
            case ast.Call(
                func=ast.Attribute(value=ast.Name(id=name), attr="append" | "add"), args=[value]
            ) if is_span(value, stamps):
                spans.add(name)
    return stamps, spans


def stopwatches(source: str) -> Iterator[tuple[str, int]]:
    """Function and line of each assertion on what a clock says."""
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, Function):
            continue
        stamps, spans = names_of(function)
        for node in ast.walk(function):
            if not isinstance(node, ast.Assert):
                continue
            compares = (part for part in ast.walk(node.test) if isinstance(part, ast.Compare))
            if any(reads_clock(one, spans) or is_span(one, stamps) for one in compares):
                yield function.name, node.lineno


def test_no_test_holds_a_stopwatch():
    found = {
        (str(file.relative_to(TESTS)), function): line
        for file in sorted(TESTS.rglob("*.py"))
        for function, line in stopwatches(file.read_text())
    }
    assert {place: found[place] for place in found.keys() - ALLOWED.keys()} == {}
    assert ALLOWED.keys() <= found.keys(), "an exception that nobody needs any more"


@pytest.mark.parametrize(
    "body",
    [
        "started = time.monotonic(); work(); assert time.monotonic() - started < 2",
        "started = perf_counter(); work(); seconds = perf_counter() - started; assert seconds < 1",
        "a = time.time(); work(); b = time.time(); assert 1.3 <= b - a < 5",
        "limit = time.monotonic() + 5; assert time.monotonic() < limit",
        "waits = []; a = time.monotonic(); waits.append(time.monotonic() - a); "
        "assert max(waits) < 0.3",
        "a = time.monotonic(); took = time.monotonic() - a; assert took / other < 4",
    ],
)
def test_one_would_be_found(body):
    assert [name for name, _ in stopwatches(f"def test():\n    {body}")] == ["test"]


@pytest.mark.parametrize(
    "body",
    [
        "assert answered == ['short', 'long']",
        "before = int(time.time()); work(); assert before <= created",
        "limit = time.monotonic() + 60\n    while time.monotonic() < limit: work()",
    ],
)
def test_orders_and_waits_are_none(body):
    assert list(stopwatches(f"def test():\n    {body}")) == []
