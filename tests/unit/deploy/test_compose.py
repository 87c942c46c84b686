"""The compose file: one command for the server, Prometheus and Grafana."""

import re
from pathlib import Path

import pytest
import yaml

from krea2_server.settings import Settings

FOLDER = Path(__file__).parents[3] / "deploy" / "compose"
COMPOSE = yaml.safe_load((FOLDER / "compose.yaml").read_text())
SERVICES = COMPOSE["services"]
SERVERS = [name for name, service in SERVICES.items() if name.startswith("krea2-")]


def seconds(text: str) -> float:
    found = re.fullmatch(r"(\d+)s", text)
    assert found
    return float(found[1])


@pytest.mark.parametrize("name", SERVERS)
def test_a_server_is_confined_and_may_finish(name):
    service = SERVICES[name]
    assert service["read_only"]
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert "privileged" not in service
    # The image's own asks where the server listens.
    assert "healthcheck" not in service
    drain_s = Settings.model_fields["drain_timeout_s"].default
    assert seconds(service["stop_grace_period"]) > drain_s
    assert service["networks"]["default"]["aliases"] == ["krea2"]
    assert "/tmp" in service["tmpfs"][0]
    assert service["volumes"] == ["cache:/cache"]


@pytest.mark.parametrize("name", SERVERS)
def test_its_variables_are_settings_and_keys_are_demanded(name):
    environment = SERVICES[name]["environment"]
    for variable in environment:
        if variable.startswith("KREA2_SERVE_"):
            assert variable.removeprefix("KREA2_SERVE_").lower() in Settings.model_fields
    assert environment["KREA2_SERVE_API_KEYS"].startswith("${KREA2_SERVE_API_KEYS:?")


def test_each_profile_has_one_server_and_the_rest_is_in_both():
    assert sorted(SERVICES[name]["profiles"] for name in SERVERS) == [["cpu"], ["gpu"]]
    assert not any("profiles" in SERVICES[name] for name in ("prometheus", "grafana"))


def test_what_is_mounted_and_built_is_there():
    for service in SERVICES.values():
        for volume in service["volumes"]:
            source = volume.split(":")[0]
            if source.startswith("."):
                assert (FOLDER / source).exists(), source
            else:
                assert source in COMPOSE["volumes"]
        if "build" in service:
            assert (FOLDER / service["build"]["context"] / "Dockerfile").exists()
    arguments = SERVICES["krea2-cpu"]["build"]["args"]
    dockerfile = (FOLDER / "../../Dockerfile").read_text()
    assert all(re.search(rf"^ARG {name}=", dockerfile, re.M) for name in arguments)


def test_only_this_machine_reaches_what_is_published():
    for service in SERVICES.values():
        assert all(port.startswith("127.0.0.1:") for port in service["ports"])


def test_prometheus_asks_where_the_server_is():
    config = yaml.safe_load((FOLDER / "../prometheus/prometheus.yml").read_text())
    (job,) = config["scrape_configs"]
    assert job["static_configs"] == [{"targets": ["krea2:30000"]}]
    port = Settings.model_fields["port"].default
    assert f":{port}:{port}" in SERVICES["krea2-gpu"]["ports"][0]


def test_grafana_finds_prometheus_and_its_dashboard():
    provisioning = FOLDER / "../grafana/provisioning"
    sources = yaml.safe_load((provisioning / "datasources/prometheus.yaml").read_text())
    assert sources["datasources"][0]["url"] == "http://prometheus:9090"
    providers = yaml.safe_load((provisioning / "dashboards/krea2.yaml").read_text())
    path = providers["providers"][0]["options"]["path"]
    assert any(volume.endswith(f":{path}:ro") for volume in SERVICES["grafana"]["volumes"])
