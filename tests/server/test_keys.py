"""Who may ask, and what of it: keys in files and the environment, and their limits over HTTP."""

import dataclasses
import hashlib
import threading

import openai
import pytest

from krea2_server.errors import ApiError
from krea2_server.keys import Client, Keys, check_rights
from krea2_server.settings import load_settings
from krea2_srt.errors import ConfigError
from tests.channel import wait_until
from tests.server.serving import serve

TEAM, BATCH, HASHED = "sk-team-0123456789", "sk-batch-0123456789", "sk-hashed-0123456789"
ENVIRONMENT = "sk-environment-0123456789"
FILE = f"""
keys:
  - name: team
    key: {TEAM}
    low_moderation: true
  - name: batch
    key: {BATCH}
    requests_per_minute: 60
    max_concurrent: 2
    max_priority: 0
  - name: hashed
    sha256: {hashlib.sha256(HASHED.encode()).hexdigest()}
"""


@pytest.fixture
def keys_of(tmp_path, monkeypatch):
    def load(text: str, *flags: str) -> Keys:
        file = tmp_path / "keys.yaml"
        file.write_text(text)
        return Keys.from_settings(load_settings(["--api-keys-file", str(file), *flags]))

    return load


def bearer(key: str) -> str:
    return f"Bearer {key}"


def test_each_key_is_its_clients(keys_of, monkeypatch):
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", f" {ENVIRONMENT} ,")
    keys = keys_of(FILE, "--requests-per-minute", "7", "--max-concurrent", "3")
    assert keys.client(bearer(TEAM)) == Client("team", 7, 3, low_moderation=True)
    assert keys.client(bearer(BATCH)) == Client("batch", 60, 2, max_priority=0)
    assert keys.client(bearer(HASHED)).name == "hashed"
    assert keys.client(bearer(ENVIRONMENT)) == Client("key-0", 7, 3)
    assert keys.client(f"bearer  {TEAM} ").name == "team"


@pytest.mark.parametrize(
    ("header", "code"),
    [
        (None, "no_api_key"),
        ("", "no_api_key"),
        ("Bearer", "no_api_key"),
        ("Bearer ", "no_api_key"),
        (f"Basic {TEAM}", "no_api_key"),
        (TEAM, "no_api_key"),
        (bearer(TEAM[:-1]), "invalid_api_key"),
        (bearer(TEAM + "x"), "invalid_api_key"),
        (bearer(hashlib.sha256(HASHED.encode()).hexdigest()), "invalid_api_key"),
        (bearer("\ud800é\x00"), "invalid_api_key"),
    ],
)
def test_anything_else_is_refused(keys_of, header, code):
    with pytest.raises(ApiError) as caught:
        keys_of(FILE).client(header)
    assert (caught.value.status, caught.value.code) == (401, code)
    assert caught.value.headers["www-authenticate"] == "Bearer"


def test_without_keys_all_are_one_client_with_the_default_limits():
    keys = Keys.from_settings(load_settings(["--max-concurrent", "5"]))
    assert keys.client(None) == keys.client("Bearer anything") == Client("anonymous", 0, 5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "a list named keys"),
        ("[]", "a list named keys"),
        ("keys: []", "a list named keys"),
        ("keys: {}", "a list named keys"),
        ("keys: [\n  - :", "line 2: expected the node"),
        ("keys: [{name: a, key: short}]", "keys.0: key: must have at least 16"),
        ("keys: [{name: a, key: sk-0123456789-ü-abc}]", "printable ASCII"),
        ("keys: [{name: a}]", "either key or sha256"),
        (f"keys: [{{name: a, key: {TEAM}, sha256: {'ab' * 32}}}]", "either key or sha256"),
        (f"keys: [{{key: {TEAM}}}]", "keys.0.name: Field required"),
        ("keys: [{name: a, sha256: abc}]", "keys.0.sha256"),
        (f"keys: [{{name: a, key: {TEAM}, limit: 3}}]", "keys.0.limit"),
        (f"keys: [{{name: a, key: {TEAM}, max_concurrent: -1}}]", "keys.0.max_concurrent"),
        (f"keys: [{{name: a, key: {TEAM}, max_priority: 11}}]", "keys.0.max_priority"),
        (f"keys: [{{name: a, key: {TEAM}}}, {{name: a, key: {BATCH}}}]", "a: name or key"),
        (f"keys: [{{name: a, key: {TEAM}}}, {{name: b, key: {TEAM}}}]", "b: name or key"),
    ],
)
def test_a_wrong_file_is_told_without_its_keys(keys_of, text, said):
    with pytest.raises(ConfigError) as caught:
        keys_of(text)
    assert said in str(caught.value)
    assert "api_keys_file" in str(caught.value)
    assert TEAM not in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_short_key_in_the_environment_are_told(monkeypatch):
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: No such file"):
        Keys.from_settings(load_settings(["--api-keys-file", "nowhere.yaml"]))
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", "sk-secret")
    with pytest.raises(ConfigError, match="key 0 must have at least 16") as caught:
        Keys.from_settings(load_settings([]))
    assert "sk-secret" not in str(caught.value)


def test_what_a_key_does_not_allow_is_refused_with_its_field():
    client = Client("batch", max_priority=0)
    check_rights(client, 0, False)
    check_rights(dataclasses.replace(client, low_moderation=True), -1, True)
    for priority, low, field in ((1, False, "priority"), (0, True, "moderation")):
        with pytest.raises(ApiError) as caught:
            check_rights(client, priority, low)
        assert (caught.value.status, caught.value.param) == (403, field)


@pytest.fixture(scope="module")
def guarded(shared_engine, tmp_path_factory):
    """A server that has keys."""
    folder = tmp_path_factory.mktemp("guarded")
    (folder / "keys.yaml").write_text(FILE)
    flags = ["--api-keys-file", "keys.yaml", "--engine-endpoints", shared_engine.endpoint]
    with serve(folder, *flags) as server:
        yield server


def ask(server, key, **fields):
    return server.post({"authorization": bearer(key)}, **{"prompt": "x", "size": "64x64"} | fields)


def test_the_official_client_is_let_in_with_a_key_and_not_without(guarded, engine):
    guarded.client(api_key=TEAM).images.generate(prompt="x", size="64x64")
    with pytest.raises(openai.AuthenticationError) as caught:
        guarded.client(api_key="sk-wrong-0123456789").images.generate(prompt="x", size="64x64")
    assert caught.value.code == "invalid_api_key"
    assert len(engine.requests) == 1
    refused = guarded.get("/v1/models")
    assert refused.status_code == 401
    assert refused.headers["www-authenticate"] == "Bearer"
    assert guarded.get("/v1/queue").status_code == 401


@pytest.mark.parametrize("path", ["/v1/models", "/v1/nowhere", "/v1//models", "/v1/images/files"])
def test_nothing_below_v1_is_open(guarded, path):
    assert guarded.get(path).status_code == 401


def test_health_is_open_and_so_are_signed_urls(guarded, engine):
    assert guarded.get("/health").status_code == 200
    assert guarded.get("/ready").status_code == 200
    found = ask(guarded, TEAM, response_format="url").json()["data"][0]["url"]
    assert guarded.get(found.removeprefix(guarded.url)).status_code == 200
    assert guarded.get(found.removeprefix(guarded.url)[:-1] + "g").status_code == 404


def test_a_priority_needs_a_key_that_allows_it(guarded, engine):
    assert ask(guarded, TEAM, priority=5, moderation="low").status_code == 200
    assert ask(guarded, BATCH, priority=0, moderation="auto").status_code == 200
    refused = ask(guarded, BATCH, priority=1)
    assert refused.status_code == 403
    assert refused.json()["error"]["param"] == "priority"
    assert refused.json()["error"]["type"] == "permission_error"
    # Nothing is moderated here: nobody needs a right to less of it.
    assert ask(guarded, BATCH, moderation="low").status_code == 200


def test_requests_at_a_time_are_limited_for_each_key(guarded, engine):
    engine.hold.set()
    answers: list = []

    def send() -> None:
        answers.append(ask(guarded, HASHED, size="64x64"))

    threads = [threading.Thread(target=send) for _ in range(3)]
    batch = [threading.Thread(target=lambda: answers.append(ask(guarded, BATCH))) for _ in range(2)]
    for thread in threads + batch:
        thread.start()
    wait_until(lambda: engine.waiting == 5)
    refused = ask(guarded, BATCH)
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "concurrency_limit"
    assert refused.headers["x-should-retry"] == "true"
    engine.hold.clear()
    for thread in threads + batch:
        thread.join()
    assert [answer.status_code for answer in answers] == [200] * 5
    assert ask(guarded, BATCH).status_code == 200


def test_requests_a_minute_are_limited_for_each_key(guarded, engine):
    refused = None
    for _ in range(30):
        if (answer := ask(guarded, BATCH)).status_code != 200:
            refused = answer
            break
    assert refused is not None
    assert refused.status_code == 429
    assert refused.json()["error"]["code"] == "rate_limit_exceeded"
    assert 0 < int(refused.headers["retry-after-ms"]) <= 1000
    assert ask(guarded, TEAM).status_code == 200
    # The official client waits as long as it is told, and gets through.
    guarded.client(api_key=BATCH, max_retries=2).images.generate(prompt="x", size="64x64")


def test_no_key_is_in_the_log(guarded, engine):
    ask(guarded, TEAM)
    ask(guarded, "sk-not-a-key-0123456789")
    assert "client=team" in guarded.log
    for secret in (TEAM, BATCH, HASHED, "sk-not-a-key"):
        assert secret not in guarded.log
