"""What a plain install has, what extras add, and the line that says which one is missing."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest

from krea2_srt.errors import how_to_install

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OURS = {"krea2_srt", "krea2_server", "krea2_bench", "tests"}

# Reads the metadata of all that is installed.
packages_distributions = cache(importlib.metadata.packages_distributions)


def names(requirements: list[str]) -> set[str]:
    """Distributions of some requirements, those of extras that they name too."""
    found: set[str] = set()
    for text in requirements:
        name = re.split(r"[<>=;\[ ]", text)[0]
        if name == "krea2-srt":
            for extra in re.findall(r"[\w-]+", text.partition("[")[2]):
                found |= names(PROJECT["optional-dependencies"][extra])
        else:
            found.add(name.lower().replace("_", "-"))
    return found


def with_extras(*extras: str) -> set[str]:
    every = PROJECT["optional-dependencies"]
    return names(PROJECT["dependencies"]).union(*(names(every[extra]) for extra in extras))


def imported(folder: Path) -> dict[str, set[str]]:
    """Distributions that the sources of a folder import, and the files that do."""
    found: dict[str, set[str]] = {}
    known = packages_distributions()
    for file in folder.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            match node:
                case ast.Import(names=aliases):
                    modules = [alias.name for alias in aliases]
                case ast.ImportFrom(module=str(module), level=0):
                    modules = [module]
                case _:
                    continue
            for module in modules:
                top = module.split(".")[0]
                if top in sys.stdlib_module_names or top in OURS:
                    continue
                for distribution in known.get(top, [top]):
                    name = distribution.lower().replace("_", "-")
                    found.setdefault(name, set()).add(str(file.relative_to(ROOT)))
    return found


SGLANGS = {"sglang", "sglang-kernel", "triton", "torchvision", "diffusers", "starlette", "fastapi"}
"""What SGLang brings."""


@pytest.mark.parametrize(
    ("folder", "extras", "others"),
    [
        # Its harness for tests and benchmarks is theirs.
        ("krea2_srt", ["fa4"], {"httpx", "psutil", "nvidia-cutlass-dsl"}),
        ("server/krea2_server", ["serve", "ray", "s3", "otel"], set()),
        ("benchmarks/krea2_bench", ["bench", "ray"], {"piq"}),
    ],
)
def test_what_is_imported_is_declared(folder, extras, others):
    declared = with_extras(*extras) | SGLANGS | others
    undeclared = {
        name: files
        for name, files in imported(ROOT / folder).items()
        if name not in declared and not any(other in declared for other in _aliases(name))
    }
    assert undeclared == {}


def _aliases(name: str) -> set[str]:
    """Other distributions that bring the same import names."""
    known = packages_distributions()
    return {
        other.lower().replace("_", "-")
        for brought in known.values()
        if name in {one.lower().replace("_", "-") for one in brought}
        for other in brought
    }


@pytest.mark.parametrize(
    ("module", "missing", "extra"),
    [
        ("krea2_server.__main__", "fastapi", "serve"),
        ("krea2_server.__main__", "uvicorn", "serve"),
        ("krea2_bench.cli", "aiohttp", "bench"),
    ],
)
def test_a_missing_extra_is_one_line(module, missing, extra):
    command = f"import sys; sys.modules[{missing!r}] = None; from {module} import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    program = {"serve": "krea2-serve", "bench": "krea2-bench"}[extra]
    line = f"{program}: error: {missing} is not installed; {how_to_install(extra)}\n"
    assert done.stderr == line
    assert how_to_install(extra) == f"uv pip install '.[{extra}]' (see README.md)"
    assert done.stdout == ""


def test_a_fault_of_our_own_is_not_taken_for_a_missing_extra():
    command = "import sys; sys.modules['krea2_server.services'] = None\n"
    command += "from krea2_server.__main__ import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", command, "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "ModuleNotFoundError" in done.stderr


def test_traces_without_opentelemetry_are_refused_by_name(monkeypatch):
    from krea2_server.observability.tracing import Tracing
    from krea2_srt.errors import ConfigError

    for name in [name for name in sys.modules if name.startswith("opentelemetry")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "opentelemetry", None)
    with pytest.raises(ConfigError, match=r"^otlp_endpoint: .*'\.\[otel\]'"):
        Tracing("http://127.0.0.1:4318/v1/traces")
    Tracing("")


def test_the_lock_is_of_all_extras():
    lock = set(re.findall(r"^([a-z0-9._-]+)==", (ROOT / "requirements.lock").read_text(), re.M))
    assert with_extras(*PROJECT["optional-dependencies"]) - {"krea2-srt"} - lock == set()
