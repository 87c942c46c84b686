"""What the server answers stays as it is recorded, byte for byte: see tests/server/recorded."""

import pytest

from tests.server.recorded.recording import EXCHANGES, difference, load, play_all

NAMES = [(server, exchange.name) for server in EXCHANGES for exchange in EXCHANGES[server]]
RECORDED = {(server, record["name"]): record for server in EXCHANGES for record in load(server)}


@pytest.fixture(scope="module")
def now(tmp_path_factory):
    """What comes of every exchange today, by server and name."""
    played = play_all(tmp_path_factory.mktemp("recorded"))
    return {(server, record["name"]): record for server in played for record in played[server]}


def test_all_exchanges_are_recorded_and_nothing_else():
    assert len(NAMES) == len(set(NAMES)) >= 200
    assert list(RECORDED) == NAMES


@pytest.mark.parametrize("name", NAMES, ids="-".join)
def test_an_exchange_is_as_it_was(now, name):
    server, exchange = name
    if name not in now:
        pytest.fail(f"not played: another exchange has failed on the server {server!r}", False)
    if changed := difference(RECORDED[name], now[name]):
        pytest.fail(f"{exchange!r} on the server {server!r} is not as recorded:\n{changed}", False)
