"""What our sources use of SGLang, found by reading them."""

import ast
import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import krea2_srt.sglang

FOLDER = Path(krea2_srt.sglang.__path__[0])
SOURCES = {
    file.stem: ast.parse(file.read_text(encoding="utf-8"))
    for file in [*sorted(FOLDER.glob("*.py")), FOLDER.parent / "plugin.py"]
}


def named(path: str) -> Any:
    """The object of a dotted path, whose modules are imported."""
    module, names = path, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, name = module.rpartition(".")
            names.insert(0, name)
    for name in names:
        found = (inspect.getattr_static if inspect.isclass(found) else getattr)(found, name)
    return found


def parameters(path: str) -> str:
    """Names of the parameters of a function or method."""
    found = named(path)
    found = getattr(found, "fget", found)  # of a property
    return ", ".join(inspect.signature(getattr(found, "__func__", found)).parameters)


def imported_functions() -> Iterator[str]:
    """Functions of SGLang's that our files import, by their dotted paths."""
    for tree in SOURCES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sglang."):
                for name in node.names:
                    path = f"{node.module}.{name.name}"
                    if inspect.isroutine(named(path)):
                        yield path


def foreign_privates() -> Iterator[str]:
    """Uses of names with an underscore on anything but ``self``, by file and line."""
    for stem, tree in SOURCES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
                own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
                if not own and not node.attr.startswith("__"):
                    yield f"{stem}.py:{node.lineno}: {ast.unparse(node)}"


def from_bases(module: str, name: str) -> set[str]:
    """Names that a class of ours takes from its bases: ``self.x`` that it neither defines, declares
    nor sets first, and methods that it overrides.
    """
    tree = SOURCES[module]
    (definition,) = (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name)
    methods = {n.name for n in definition.body if isinstance(n, ast.FunctionDef)}
    used, written = set(), set()
    for node in ast.walk(definition):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id == "self":
                (written if isinstance(node.ctx, ast.Store) else used).add(node.attr)
            continue
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Call)
            and ast.unparse(node.value) == "super()"
        ):
            used.add(node.attr)
    cls = getattr(importlib.import_module(f"krea2_srt.sglang.{module}"), name)
    bases = [base for base in cls.__mro__ if base.__module__.startswith("sglang.")]
    overridden = {m for m in methods if any(m in vars(base) for base in bases)}
    sources = "\n".join(inspect.getsource(base) for base in bases)
    inherited = {a for a in written if f"self.{a} " in sources or f"self.{a}:" in sources}
    return (used - methods - written) | overridden | inherited


def of_the_worker() -> set[str]:
    """Names of SGLang's worker that are read or called, or set."""
    return {
        node.attr
        for tree in SOURCES.values()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and ast.unparse(node.value) in ("worker", "self.worker", "self._worker")
    }
