"""Which of its arguments a Triton kernel writes, read from its source."""

import ast
import inspect
import textwrap
from typing import Any

_STORES = ("store", "atomic_add", "atomic_max", "atomic_min", "atomic_xchg", "atomic_cas")
_known: dict[Any, frozenset[str]] = {}


def written_arguments(kernel: Any) -> frozenset[str]:
    """Names of the pointers that a kernel, or what it calls, stores through.

    Args:
        kernel: a function under ``triton.jit``, compiled or interpreted.
    """
    function = kernel.fn
    if function not in _known:
        _known[function] = frozenset()  # of one that calls itself
        _known[function] = _written(function)
    return _known[function]


def _written(function: Any) -> frozenset[str]:
    tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    assert isinstance(tree, ast.FunctionDef)
    parameters = [argument.arg for argument in tree.args.args]
    # From local names to the parameters that went into them.
    origins = {name: {name} for name in parameters}

    def of(node: ast.AST) -> set[str]:
        names = [n.id for n in ast.walk(node) if isinstance(n, ast.Name)]
        return set().union(*(origins.get(name, set()) for name in names))

    found: set[str] = set()
    changed = True
    while changed:
        before = (len(found), sum(map(len, origins.values())))
        for node in ast.walk(tree):
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=value):
                    if not _loads(value):
                        origins.setdefault(name, set()).update(of(value))
                case ast.AugAssign(target=ast.Name(id=name), value=value):
                    if not _loads(value):
                        origins.setdefault(name, set()).update(of(value))
                case ast.Call(func=ast.Attribute(value=owner, attr=attribute), args=args):
                    if attribute in _STORES:
                        # tl.store(pointer, ...), or descriptor.store(...).
                        tl = isinstance(owner, ast.Name) and owner.id in ("tl", "triton")
                        found |= of(args[0]) if tl else of(owner)
                case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords):
                    callee = function.__globals__.get(name)
                    if not hasattr(callee, "fn"):
                        continue
                    names = list(inspect.signature(callee.fn).parameters)
                    given = dict(zip(names, args, strict=False))
                    given |= {k.arg: k.value for k in keywords if k.arg}
                    for written in written_arguments(callee) & given.keys():
                        found |= of(given[written])
        changed = before != (len(found), sum(map(len, origins.values())))
    return frozenset(found & set(parameters))


def _loads(node: ast.AST) -> bool:
    """Whether a value comes from memory, or from a sum: no pointer is made of it."""
    calls = [n.func for n in ast.walk(node) if isinstance(n, ast.Call)]
    names = [f.attr if isinstance(f, ast.Attribute) else getattr(f, "id", "") for f in calls]
    return bool({"load", "dot", "sum", "max", "exp", "rsqrt"} & set(names))
