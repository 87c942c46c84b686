"""The installed SGLang is the one that `krea2_srt.sglang.compat` was written for."""

import inspect
import re
from itertools import chain

import pytest

from krea2_srt.sglang.compat import ATTRIBUTES, PIPELINE, SCHEDULER, SIGNATURES, STAGE, WORKER
from tests.engine_real.sglang import uses

OURS = {
    ("scheduler", "Krea2Scheduler"): SCHEDULER,
    ("pipeline", "Krea2RunnerPipeline"): PIPELINE,
    ("stages", "EncodeStage"): STAGE,
    ("stages", "DenoiseStage"): STAGE,
    ("stages", "DecodeStage"): STAGE,
}


def listed(base: str) -> set[str]:
    """Names of a class of SGLang's that compat has."""
    methods = {path.rpartition(".")[2] for path in SIGNATURES if path.rpartition(".")[0] == base}
    return methods | set(ATTRIBUTES.get(base, ()))


@pytest.mark.parametrize("path", SIGNATURES)
def test_each_function_has_the_parameters_that_we_know(path):
    known, found = SIGNATURES[path], uses.parameters(path)
    if known.endswith(", ..."):
        assert set(known.removesuffix(", ...").split(", ")) <= set(found.split(", "))
    else:
        assert found == known


@pytest.mark.parametrize(
    ("base", "name"), [(base, name) for base, names in ATTRIBUTES.items() for name in names]
)
def test_each_attribute_is_still_set(base, name):
    source = "\n".join(
        inspect.getsource(c) for c in uses.named(base).__mro__ if c.__module__.startswith("sglang.")
    )
    assert re.search(rf"\b{name}\b(: [^=\n]+)? =", source), f"{base} sets no {name}"


@pytest.mark.parametrize(("ours", "base"), OURS.items(), ids=[name for _, name in OURS])
def test_what_our_classes_take_from_sglangs_is_listed(ours, base):
    assert uses.from_bases(*ours) - listed(base) == set()


def test_what_is_called_of_the_worker_is_listed():
    assert uses.of_the_worker() - listed(WORKER) == set()


def test_every_imported_function_is_listed():
    assert set(uses.imported_functions()) - set(SIGNATURES) == set()


def test_only_compat_uses_names_with_an_underscore():
    assert [use for use in uses.foreign_privates() if not use.startswith("compat.py:")] == []


def test_nothing_is_listed_that_is_not_used():
    used = set(uses.imported_functions())
    used |= {f"{base}.{name}" for ours, base in OURS.items() for name in uses.from_bases(*ours)}
    used |= {f"{WORKER}.{name}" for name in uses.of_the_worker()}
    methods = (path for path in SIGNATURES if path.rpartition(".")[0] in (SCHEDULER, WORKER, STAGE))
    values = (f"{WORKER}.{name}" for name in ATTRIBUTES[WORKER])
    privates = {f"{WORKER}.{use.rpartition('.')[2]}" for use in uses.foreign_privates()}
    assert set(chain(methods, values)) - used - privates == set()
