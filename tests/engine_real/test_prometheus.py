"""Rules, alerts and the dashboard, on a real Prometheus that scrapes the real server."""

import contextlib
import json
import math
import re
import subprocess
import threading
from pathlib import Path

import httpx
import pytest
import yaml

from krea2_srt.testing.processes import ChildProcess, free_ports
from tests.channel import wait_until
from tests.programs import required
from tests.server.serving import Api

DEPLOY = Path(__file__).parents[2] / "deploy"
RULES = DEPLOY / "prometheus" / "alerts.yml"
DASHBOARD = json.loads((DEPLOY / "grafana" / "dashboards" / "krea2.json").read_text())
PANELS = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = [
    pytest.param(target["expr"], id=f"{panel['title']} {target['refId']}")
    for panel in PANELS
    for target in panel["targets"]
]
ALL_RULES = [
    rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]
]
ALERTS = [rule for rule in ALL_RULES if "alert" in rule]

REQUESTS = "krea2_requests_total"

_SUFFIX = re.compile(r"_(bucket|sum|count)$")
"""Endings of a histogram's parts."""


@pytest.mark.parametrize(
    "command",
    [
        ["check", "config", DEPLOY / "prometheus" / "prometheus.yml"],
        ["check", "rules", RULES],
        pytest.param(
            ["test", "rules", DEPLOY / "prometheus" / "alerts_test.yml"], marks=pytest.mark.slow
        ),
    ],
    ids=lambda command: " ".join(command[:2]),
)
def test_rules_and_configuration_are_valid(command):
    program = [required("promtool"), *command]
    result = subprocess.run(program, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_alert_is_tested_and_says_what_to_do():
    tests = yaml.safe_load((DEPLOY / "prometheus" / "alerts_test.yml").read_text())["tests"]
    checks = [check for test in tests for check in test["alert_rule_test"]]
    guide = (DEPLOY.parent / "docs/operations.md").read_text()
    for alert in ALERTS:
        name = alert["alert"]
        mine = [check for check in checks if check["alertname"] == name]
        assert any(check.get("exp_alerts") for check in mine), f"{name} is never seen to fire"
        assert any(not check.get("exp_alerts") for check in mine), f"{name} is never silent"
        assert alert["labels"]["severity"] in ("page", "ticket")
        file, _, anchor = alert["annotations"]["runbook"].partition("#")
        assert file == "docs/operations.md"
        assert anchor == name.lower()
        assert f"### {name}\n" in guide, f"the guide says nothing of {name}"


def test_every_panel_says_what_it_shows():
    for panel in PANELS:
        assert panel["description"], panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["datasource"]["uid"] == "${datasource}"
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(set(ids)) == len(ids)


def test_rules_and_panels_name_what_the_server_exports_and_leave_nothing_out(real_server):
    text = real_server.get("/metrics").text
    exported = set(re.findall(r"^# TYPE (krea2_\w+)", text, re.MULTILINE))
    exported = {name for name in exported if not name.endswith("_created")}
    # Only on a GPU, and only with a policy.
    exported |= {
        "krea2_engine_device_memory_bytes",
        "krea2_engine_device_memory_peak_bytes",
        "krea2_moderation_checks_total",
    }
    shown = _named(json.dumps(PANELS))
    assert shown <= exported
    assert not exported - shown
    assert _named(RULES.read_text()) <= exported


@pytest.fixture(scope="module")
def prometheus(real_server, tmp_path_factory):
    """The address of a Prometheus with our rules that has scraped the server at work."""
    program = required("prometheus")
    folder = tmp_path_factory.mktemp("prometheus")
    config = yaml.safe_load((DEPLOY / "prometheus" / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(RULES)]
    config["scrape_configs"][0]["static_configs"][0]["targets"] = [real_server.url.split("//")[1]]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    port = free_ports(["prometheus"])["prometheus"]
    address = f"127.0.0.1:{port}"
    command = [
        program,
        f"--config.file={folder / 'prometheus.yml'}",
        f"--storage.tsdb.path={folder / 'data'}",
        f"--web.listen-address={address}",
    ]
    with ChildProcess(command, folder / "prometheus.log") as process:
        url = f"http://{address}"
        process.wait_until(lambda: _answers(url), "it answers")
        # It begins seconds after it is ready.
        wait_until(lambda: query(url, "krea2_replicas_ready"))
        # Twice: a series that begins with a request has no rate before the next.
        for _ in range(2):
            _work(real_server)
            _seen(url, real_server)
        yield url


@pytest.mark.slow
@pytest.mark.parametrize("expression", QUERIES)
def test_every_panel_has_data(prometheus, expression):
    variables = {"$instance": ".*", "$__rate_interval": "5m", "$peak": "790", "$bandwidth": "4.3"}
    for name, value in variables.items():
        expression = expression.replace(name, value)
    assert "$" not in expression
    values = wait_until(lambda: query(prometheus, expression), 20)
    assert not any(math.isnan(value) for value in values)


@pytest.mark.slow
def test_rules_are_evaluated_and_no_alarm_is_raised(prometheus):
    wait_until(lambda: query(prometheus, "krea2:requests_failed:ratio_rate5m"), 20)
    groups = httpx.get(f"{prometheus}/api/v1/rules").json()["data"]["groups"]
    rules = [rule for group in groups for rule in group["rules"]]
    assert len(rules) == len(ALL_RULES)
    assert all(rule["health"] == "ok" for rule in rules), rules
    assert not [rule["name"] for rule in rules if rule.get("state") == "firing"]


def query(url: str, expression: str) -> list[float]:
    """Values of an instant query."""
    answer = httpx.get(f"{url}/api/v1/query", params={"query": expression}).json()
    assert answer["status"] == "success", answer
    return [float(series["value"][1]) for series in answer["data"]["result"]]


def _answers(url: str) -> bool:
    with contextlib.suppress(httpx.HTTPError):
        return httpx.get(f"{url}/-/ready").status_code == 200
    return False


def _work(server: Api) -> None:
    """Some requests at a time, a stream, one that is refused, and one that is given up."""
    threads = [
        threading.Thread(target=server.post, kwargs={"prompt": "x", "size": size, "seed": 1})
        for size in ("64x64", "256x256", "272x256")
    ]
    for thread in threads:
        thread.start()
    list(_stream(server, "64x64"))
    assert server.post(prompt="x", size="7").status_code == 400
    for thread in threads:
        thread.join()
    cancelled = server.metric(REQUESTS, outcome="cancelled")
    with _stream(server, "512x512") as given_up:
        next(iter(given_up))
    wait_until(lambda: server.metric(REQUESTS, outcome="cancelled") > cancelled)


def _stream(server: Api, size: str):
    return server.client().images.generate(prompt="x", size=size, stream=True, partial_images=1)


def _seen(url: str, server: Api) -> None:
    """Wait until Prometheus knows of all requests that have ended."""
    for outcome in ("done", "cancelled"):
        ended = [server.metric(REQUESTS, outcome=outcome)]
        wait_until(
            lambda ended=ended, of=outcome: query(url, f'{REQUESTS}{{outcome="{of}"}}') >= ended
        )


def _named(text: str) -> set[str]:
    names = set(re.findall(r"\bkrea2_\w+", text))
    return {_SUFFIX.sub("", name) for name in names}
