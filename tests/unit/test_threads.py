"""How threads wait: what is set, that a user's own setting stays, and who sets it."""

import asyncio
from pathlib import Path

import psutil
import pytest

from krea2_server.engine.supervisor import worker_environment
from krea2_server.moderation.model_process import ModelProcess
from krea2_server.settings import Settings
from krea2_srt.threads import SPIN_COUNT, VARIABLES, limit_spinning, wait_variables

OURS = {"GOMP_SPINCOUNT": str(SPIN_COUNT)}
USERS = [("OMP_WAIT_POLICY", "active"), ("GOMP_SPINCOUNT", "7"), ("KMP_BLOCKTIME", "0")]


@pytest.fixture
def unset(monkeypatch):
    """Nobody has decided; the tests' own processes do."""
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_the_spin_count_is_set_where_nobody_has_decided():
    environment = {"PATH": "/bin", "OMP_NUM_THREADS": "2"}
    limit_spinning(environment)
    assert environment == {"PATH": "/bin", "OMP_NUM_THREADS": "2", **OURS}


@pytest.mark.parametrize(("name", "value"), USERS)
def test_a_users_setting_stays(name, value):
    environment = {name: value}
    limit_spinning(environment)
    assert environment == {name: value}
    assert wait_variables(environment) == {}


def test_engine_processes_get_it(unset):
    """Also on Ray, where a replica starts its engine the same way."""
    environment = worker_environment(Settings(model_path="x"), 0)
    assert environment.items() >= OURS.items()


@pytest.mark.parametrize(("name", "value"), USERS)
def test_engine_processes_get_the_users_setting(unset, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    environment = worker_environment(Settings(model_path="x"), 0)
    assert {n: environment[n] for n in VARIABLES if n in environment} == {name: value}


def test_the_process_of_moderations_models_gets_it(unset):
    async def environment() -> dict[str, str]:
        process = ModelProcess([])
        await process.start()
        try:
            children = psutil.Process().children()
            (child,) = (c for c in children if "krea2_server.moderation.worker" in c.cmdline())
            return child.environ()
        finally:
            await process.close()

    assert asyncio.run(environment()).items() >= OURS.items()


def test_the_docs_name_the_count():
    text = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    assert f"`GOMP_SPINCOUNT={SPIN_COUNT}`" in text
