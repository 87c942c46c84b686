"""Who imports whom: one way between the rooms, in no circle, and SGLang only in its adapters.

``python -m tests.unit.test_imports`` draws the rooms, as Mermaid.
"""

import ast
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = {
    "krea2_srt": ROOT / "krea2_srt",
    "krea2_server": ROOT / "server" / "krea2_server",
    "krea2_bench": ROOT / "benchmarks" / "krea2_bench",
}
BELOW = {
    "errors": set(),
    "setting": {"errors"},
    "request": {"errors", "setting"},
    "messages": {"errors", "request"},
    "host_memory": set(),
    "read_ahead": {"host_memory"},
    "start_up": {"read_ahead"},
    "kernels": set(),
    "model": {"errors", "request", "read_ahead", "kernels"},
    "lora": {"errors", "request", "messages", "yaml_files", "kernels", "model"},
    "convert": {"errors", "kernels", "model"},
    "engine": {"errors", "setting", "request"},
    "runner": {
        *("errors", "setting", "request", "host_memory", "read_ahead", "start_up"),
        *("kernels", "model", "lora", "engine"),
    },
    "routing": {"request", "engine"},
}
"""What the lower rooms of krea2_srt may import of it."""

SGLANG = {"krea2_srt.sglang", "krea2_srt.plugin"}
"""The only ones that import SGLang."""

HEAVY = {"torch", "sglang", "transformers", "triton"}


def names(file: Path) -> Iterator[tuple[str, str]]:
    """What a file imports, wherever in it: module, and the name out of it or nothing."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: imports by full names"
            yield from ((node.module or "", alias.name) for alias in node.names)


def name_of(file: Path, package: str) -> str:
    parts = [package, *file.relative_to(PACKAGES[package]).with_suffix("").parts]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def modules() -> dict[str, Path]:
    return {
        name_of(file, package): file
        for package, folder in PACKAGES.items()
        for file in folder.rglob("*.py")
    }


@cache
def graph() -> dict[str, set[str]]:
    """Each module of ours, and those of ours that it imports."""
    found = {}
    for module, file in modules().items():
        full = {f"{source}.{name}" if name else source for source, name in names(file)}
        sources = {source for source, _ in names(file)}
        inner = full & modules().keys()
        found[module] = inner | {
            source
            for source in sources & modules().keys()
            if not any(one.startswith(f"{source}.") for one in inner)
        }
    return found


def room(module: str) -> str:
    return ".".join(module.split(".")[:2])


def rooms() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for module, imported in graph().items():
        found.setdefault(room(module), set()).update(map(room, imported))
    return {name: others - {name} for name, others in found.items()}


def circle(edges: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_a_circle_is_found():
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})) == {"a", "b", "c"}


def test_no_modules_import_each_other_in_a_circle():
    assert len(graph()) > 300
    assert circle(graph()) == []


@pytest.mark.parametrize("name", BELOW)
def test_a_lower_room_imports_only_what_is_below_it(name):
    below = {f"krea2_srt.{one}" for one in BELOW[name]} | {"krea2_srt"}
    assert rooms()[f"krea2_srt.{name}"] <= below


def test_the_library_knows_neither_server_nor_benchmarks():
    for name, others in rooms().items():
        packages = {other.split(".")[0] for other in others}
        if name.startswith("krea2_srt"):
            assert packages <= {"krea2_srt"}, name
        if name.startswith("krea2_server"):
            assert packages <= {"krea2_srt", "krea2_server"}, name


def test_nothing_that_serves_imports_what_is_for_tests():
    for module, imported in graph().items():
        if not module.startswith(("krea2_bench", "krea2_srt.testing")):
            assert "krea2_srt.testing" not in set(map(room, imported)), module


def test_only_the_adapters_import_sglang():
    importing = {
        room(module)
        for module, file in modules().items()
        if any(source.split(".")[0] == "sglang" for source, _ in names(file))
    }
    # That one runs SGLang's own, to compare with.
    assert importing == SGLANG | {"krea2_bench.workers"}


def test_the_engine_and_the_shared_nouns_need_no_torch():
    shared = ("errors", "setting", "request", "messages", "routing", "environment", "read_ahead")
    light = {f"krea2_srt.{name}" for name in ("engine", *shared)}
    for module, file in modules().items():
        if room(module) in light:
            assert not HEAVY & {source.split(".")[0] for source, _ in names(file)}, module


if __name__ == "__main__":
    print("graph TD")
    for above, others in sorted(rooms().items()):
        for below in sorted(others):
            print(f"    {above} --> {below}")
