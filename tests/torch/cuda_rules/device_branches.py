"""Where our code asks which device it runs on, and which answers it has had.

Every such question in the sources (``is_cuda``, ``device.type == "cuda"``, a table by
``device.type``, ``torch.cuda.is_available()``) is wrapped, in the functions that are loaded, so
that it notes its answers.
"""

import ast
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

_NOTE = "__note_device__"


@dataclass(frozen=True)
class Question:
    """One of them.

    Attributes:
        file: relative to the folder that was searched.
        line: of it.
        text: the expression.
        cuda: its value on a GPU.
    """

    file: str
    line: int
    text: str
    cuda: Any

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.text}"


class Questions:
    """All those of a package.

    Args:
        folder: of the package.
    """

    def __init__(self, folder: Path) -> None:
        self.all: list[Question] = []
        self.answers: dict[Question, set[Any]] = {}
        self._codes: dict[tuple[str, str, int], CodeType] = {}
        for path in sorted(folder.rglob("*.py")):
            tree = ast.parse(path.read_text())
            wrapper = _Wrapper(path.relative_to(folder).as_posix(), len(self.all))
            tree = ast.fix_missing_locations(wrapper.visit(tree))
            if wrapper.found:
                self.all += wrapper.found
                for code in _functions(compile(tree, str(path), "exec")):
                    key = (str(path), code.co_qualname, code.co_firstlineno)
                    self._codes[key] = code
        self.answers = {question: set() for question in self.all}

    @property
    def never_on_cuda(self) -> list[Question]:
        """Those that were never answered as on a GPU."""
        return [question for question in self.all if question.cuda not in self.answers[question]]

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Note the answers in all functions that are loaded by now."""

        def note(number: int, value: Any) -> Any:
            self.answers[self.all[number]].add(value)
            return value

        replaced: list[tuple[FunctionType, CodeType]] = []
        for function in gc.get_objects():
            # Not isinstance: torch's deprecated names warn when they are asked for their class.
            if type(function) is not FunctionType:
                continue
            old = function.__code__
            new = self._codes.get((old.co_filename, old.co_qualname, old.co_firstlineno))
            if new is not None:
                function.__globals__[_NOTE] = note
                function.__code__ = new
                replaced.append((function, old))
        try:
            yield
        finally:
            for function, old in replaced:
                function.__code__ = old


class _Wrapper(ast.NodeTransformer):
    def __init__(self, file: str, first: int) -> None:
        self.file, self.first = file, first
        self.found: list[Question] = []

    def visit(self, node: ast.AST) -> Any:
        cuda = _answer_on_cuda(node)
        if cuda is None:
            if isinstance(node, ast.Subscript) and _is_device_type(node.slice):
                node.value = self.visit(node.value)
                node.slice = self._wrapped(node.slice, "cuda")
                return node
            return self.generic_visit(node)
        return self._wrapped(node, cuda)

    def _wrapped(self, node: Any, cuda: Any) -> ast.Call:
        number = self.first + len(self.found)
        self.found.append(Question(self.file, node.lineno, ast.unparse(node), cuda))
        call = ast.Call(ast.Name(_NOTE, ast.Load()), [ast.Constant(number), node], [])
        return ast.copy_location(call, node)


def _answer_on_cuda(node: ast.AST) -> bool | None:
    """What a question is answered on a GPU; None of any other expression."""
    match node:
        case ast.Attribute(attr="is_cuda"):
            return True
        case ast.Call(func=ast.Attribute(attr="is_available", value=ast.Attribute(attr="cuda"))):
            return True
        case ast.Compare(left=left, ops=[operator], comparators=[right]):
            sides = (left, right)
            names = [s.value for s in sides if isinstance(s, ast.Constant)]
            if any(map(_is_device_type, sides)) and names and names[0] in ("cuda", "cpu"):
                return (names[0] == "cuda") is isinstance(operator, ast.Eq)
    return None


def _is_device_type(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and node.attr == "type"


def _functions(code: CodeType) -> Iterator[CodeType]:
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield constant
            yield from _functions(constant)
