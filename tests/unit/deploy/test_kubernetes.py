"""The manifests: rendered by kustomize, valid, and in step with the server's own times."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from krea2_server.observability.metrics import _ENGINE_GAUGES
from krea2_server.settings import Settings, load_settings
from tests.programs import required

DEPLOY = Path(__file__).parents[3] / "deploy"
SCHEMAS = Path(__file__).parent / "schemas"
KUBERNETES = "1.31"
"""The oldest that the manifests are for."""

OVERLAYS = ("gpu", "cpu-demo")


@pytest.fixture(scope="module")
def rendered(tmp_path_factory) -> dict[str, dict[str, Any]]:
    """For each overlay its objects by kind; there is one of each."""
    kubectl = required("kubectl")
    folder = tmp_path_factory.mktemp("kustomize") / "kubernetes"
    shutil.copytree(DEPLOY / "kubernetes", folder)
    found = {}
    for overlay in OVERLAYS:
        target = folder / "overlays" / overlay
        shutil.copy(folder / "overlays" / "keys.example.yaml", target / "keys.yaml")
        result = subprocess.run(
            [kubectl, "kustomize", target], capture_output=True, text=True, check=True
        )
        objects = list(yaml.safe_load_all(result.stdout))
        found[overlay] = {it["kind"]: it for it in objects}
        assert len(found[overlay]) == len(objects)
    return found


def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def container(objects: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    return only


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_every_object_is_valid(rendered, overlay):
    for kind, it in rendered[overlay].items():
        if kind == "ServiceMonitor":
            jsonschema.validate(it, json.loads((SCHEMAS / "service-monitor.json").read_text()))
        else:
            kubernetes_validate.validate(it, KUBERNETES, strict=True)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_labels_names_and_ports_fit_together(rendered, overlay):
    objects = rendered[overlay]
    labels = objects["Deployment"]["spec"]["template"]["metadata"]["labels"]
    assert objects["Deployment"]["spec"]["selector"]["matchLabels"].items() <= labels.items()
    assert objects["Service"]["spec"]["selector"].items() <= labels.items()
    budget = objects["PodDisruptionBudget"]["spec"]
    assert budget["selector"]["matchLabels"].items() <= labels.items()
    policy = objects["NetworkPolicy"]["spec"]
    assert policy["podSelector"]["matchLabels"].items() <= labels.items()
    (port,) = container(objects)["ports"]
    assert port["containerPort"] == Settings.model_fields["port"].default
    assert objects["Service"]["spec"]["ports"][0]["targetPort"] == port["name"]
    assert policy["ingress"][0]["ports"] == [{"port": port["name"]}]
    volumes = {volume["name"]: volume for volume in pod(objects)["volumes"]}
    assert {mount["name"] for mount in container(objects)["volumeMounts"]} == set(volumes)
    assert volumes["keys"]["secret"]["secretName"] == objects["Secret"]["metadata"]["name"]
    claim = volumes["models"]["persistentVolumeClaim"]["claimName"]
    assert claim == objects["PersistentVolumeClaim"]["metadata"]["name"]


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_may_finish_what_it_has_accepted_and_load_what_it_must(rendered, overlay):
    spec, only = pod(rendered[overlay]), container(rendered[overlay])
    default = {name: field.default for name, field in Settings.model_fields.items()}
    command, pause_s = only["lifecycle"]["preStop"]["exec"]["command"]
    assert command == "sleep"
    grace_s = spec["terminationGracePeriodSeconds"]
    assert grace_s >= float(pause_s) + default["drain_timeout_s"] + 30
    # Endpoints are updated on the failure of the second readiness probe at the latest.
    ready = only["readinessProbe"]
    assert float(pause_s) >= ready["periodSeconds"] * ready["failureThreshold"]
    startup = only["startupProbe"]
    assert startup["periodSeconds"] * startup["failureThreshold"] >= default["start_timeout_s"]
    assert (
        rendered[overlay]["Deployment"]["spec"]["progressDeadlineSeconds"]
        > (default["start_timeout_s"])
    )
    assert startup["httpGet"]["path"] == ready["httpGet"]["path"] == "/ready"
    assert only["livenessProbe"]["httpGet"]["path"] == "/health"
    rollout = rendered[overlay]["Deployment"]["spec"]["strategy"]["rollingUpdate"]
    assert rollout == {"maxSurge": 1, "maxUnavailable": 0}


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_its_settings_are_the_servers(rendered, overlay, monkeypatch, tmp_path):
    only = container(rendered[overlay])
    for variable in only["env"]:
        if "value" in variable:
            monkeypatch.setenv(variable["name"], variable["value"])
    monkeypatch.setenv("KREA2_SERVE_HOST", "0.0.0.0")  # of the image
    settings = load_settings(only["args"])
    assert settings.storage == "none"
    mounts = {mount["mountPath"] for mount in only["volumeMounts"]}
    assert str(settings.api_keys_file.parent) in mounts
    keys = yaml.safe_load((DEPLOY / "kubernetes/overlays/keys.example.yaml").read_text())
    from krea2_server.keys import Keys

    file = tmp_path / settings.api_keys_file.name
    file.write_text(yaml.safe_dump(keys))
    Keys.from_settings(load_settings(["--api-keys-file", str(file)]))
    assert rendered[overlay]["Service"]["metadata"]["name"] != "krea2-serve"


def pod_specs(it: object) -> Iterator[dict[str, Any]]:
    """Of every pod in an object, whatever makes it."""
    if isinstance(it, dict):
        if "containers" in it:
            yield it
        it = list(it.values())
    if isinstance(it, list):
        for part in it:
            yield from pod_specs(part)


def test_no_pod_gets_the_variables_of_services(rendered, ray_service):
    """Those of a Service called krea2-serve would begin as settings do."""
    specs = [spec for it in (*rendered.values(), ray_service) for spec in pod_specs(it)]
    assert len(specs) == len(OVERLAYS) + len(ray_groups(ray_service))
    assert [spec["enableServiceLinks"] for spec in specs] == [False] * len(specs)


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_a_pod_can_do_little(rendered, overlay):
    spec, only = pod(rendered[overlay]), container(rendered[overlay])
    assert spec["securityContext"]["runAsNonRoot"]
    dockerfile = (DEPLOY.parent / "Dockerfile").read_text()
    assert f"USER {spec['securityContext']['runAsUser']}:" in dockerfile
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not spec["automountServiceAccountToken"]
    assert only["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }
    written = {mount["mountPath"] for mount in only["volumeMounts"] if not mount.get("readOnly")}
    assert {"/cache", "/tmp"} <= written
    assert sorted(rendered[overlay]["NetworkPolicy"]["spec"]["policyTypes"]) == [
        "Egress",
        "Ingress",
    ]


def test_a_gpu_each_and_as_many_as_the_work_asks_for(rendered):
    objects = rendered["gpu"]
    assert container(objects)["resources"]["limits"]["nvidia.com/gpu"] == 1
    assert "nvidia.com/gpu" not in container(rendered["cpu-demo"])["resources"]["limits"]
    scaler = objects["HorizontalPodAutoscaler"]["spec"]
    assert scaler["scaleTargetRef"]["name"] == objects["Deployment"]["metadata"]["name"]
    assert "replicas" not in objects["Deployment"]["spec"]
    (metric,) = scaler["metrics"]
    name = metric["pods"]["metric"]["name"]
    assert name in {exported for exported, _ in _ENGINE_GAUGES.values()}
    rules = (DEPLOY / "kubernetes/components/autoscaling/adapter-rules.yaml").read_text()
    (rule,) = yaml.safe_load(rules)["rules"]["custom"]
    assert rule["seriesQuery"].startswith(name + "{")
    # New ones come long before requests are refused.
    from krea2_srt.engine.config import EngineConfig

    assert float(metric["pods"]["target"]["averageValue"]) < EngineConfig().max_queue_s / 2


def test_prometheus_scrapes_what_it_should(rendered):
    monitor, service = rendered["gpu"]["ServiceMonitor"], rendered["gpu"]["Service"]
    selector = monitor["spec"]["selector"]["matchLabels"]
    assert selector.items() <= service["metadata"]["labels"].items()
    (endpoint,) = monitor["spec"]["endpoints"]
    assert endpoint["port"] == service["spec"]["ports"][0]["name"]
    # The rules go by this job's name.
    assert service["metadata"]["labels"][monitor["spec"]["jobLabel"]] == "krea2"


def test_the_rules_become_an_object_of_the_operator():
    result = subprocess.run(
        [DEPLOY / "kubernetes" / "rules.sh"], capture_output=True, text=True, check=True
    )
    it = yaml.safe_load(result.stdout)
    assert (it["apiVersion"], it["kind"]) == ("monitoring.coreos.com/v1", "PrometheusRule")
    assert it["spec"] == yaml.safe_load((DEPLOY / "prometheus" / "alerts.yml").read_text())


@pytest.fixture(scope="module")
def ray_service() -> dict[str, Any]:
    return yaml.safe_load((DEPLOY / "ray" / "rayservice.yaml").read_text())


def ray_groups(ray_service: dict[str, Any]) -> list[dict[str, Any]]:
    cluster = ray_service["spec"]["rayClusterConfig"]
    return [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]


def test_the_ray_service_is_valid(ray_service):
    jsonschema.validate(ray_service, json.loads((SCHEMAS / "ray-service.json").read_text()))
    cluster = ray_service["spec"]["rayClusterConfig"]
    for group in ray_groups(ray_service):
        template = group["template"] | {"metadata": {"name": "x"}}
        kubernetes_validate.validate(
            {"apiVersion": "v1", "kind": "Pod", **template}, KUBERNETES, strict=True
        )
        assert template["spec"]["securityContext"]["runAsNonRoot"]
        (container,) = template["spec"]["containers"]
        assert {"name": "RAY_worker_niceness", "value": "0"} in container["env"]
    import ray

    assert cluster["rayVersion"] == ray.__version__


@pytest.mark.parametrize("name", ["serve.yaml", "demo.yaml", "rayservice.yaml"])
def test_ray_serve_takes_the_configuration(name, ray_service):
    from ray.serve.schema import ServeDeploySchema

    from krea2_server.ray.arguments import Arguments

    if name == "rayservice.yaml":
        config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    else:
        config = yaml.safe_load((DEPLOY / "ray" / name).read_text())
    (application,) = ServeDeploySchema.model_validate(config).applications
    module, _, function = application.import_path.partition(":")
    assert hasattr(__import__(module, fromlist=[function]), function)
    arguments = Arguments(**application.args)
    if name != "demo.yaml":
        assert arguments.gpus == 1


def test_a_ray_workers_pod_may_finish_what_it_has(ray_service):
    (workers,) = ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    grace_s = workers["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace_s > Settings.model_fields["drain_timeout_s"].default + 30
