"""The manifests: rendered by kustomize, valid, and in step with the server's own times."""

import json
import shutil
import subprocess
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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


COMPONENTS = ("monitoring", "autoscaling", "tracing", "object-store", "openshift")


@pytest.fixture(scope="module")
def render(tmp_path_factory) -> Callable[..., dict[str, Any]]:
    """Renders an overlay with changes of its own: its objects by kind; there is one of each."""
    kubectl = required("kubectl")

    def render(overlay: str, components: Sequence[str] = (), patches: Sequence[dict] = ()):
        folder = tmp_path_factory.mktemp("kustomize") / "kubernetes"
        shutil.copytree(DEPLOY / "kubernetes", folder)
        target = folder / "overlays" / overlay
        shutil.copy(folder / "overlays" / "keys.example.yaml", target / "keys.yaml")
        file = target / "kustomization.yaml"
        changed = yaml.safe_load(file.read_text())
        known = changed.setdefault("components", [])
        known += [f"../../components/{one}" for one in components]
        changed["patches"] += patches
        file.write_text(yaml.safe_dump(changed))
        result = subprocess.run(
            [kubectl, "kustomize", target], capture_output=True, text=True, check=True
        )
        objects = list(yaml.safe_load_all(result.stdout))
        found = {it["kind"]: it for it in objects}
        assert len(found) == len(objects)
        return found

    return render


@pytest.fixture(scope="module")
def rendered(render) -> dict[str, dict[str, Any]]:
    """For each overlay its objects by kind."""
    return {overlay: render(overlay) for overlay in OVERLAYS}


@pytest.fixture(scope="module")
def with_all(render) -> dict[str, Any]:
    """The demo's objects with every component."""
    assert {one.name for one in (DEPLOY / "kubernetes/components").iterdir()} == set(COMPONENTS)
    return render("cpu-demo", COMPONENTS)


def pod(objects: dict[str, Any]) -> dict[str, Any]:
    return objects["Deployment"]["spec"]["template"]["spec"]


def container(objects: dict[str, Any]) -> dict[str, Any]:
    (only,) = pod(objects)["containers"]
    return only


@pytest.mark.parametrize("overlay", [*OVERLAYS, "with all components"])
def test_every_object_is_valid(rendered, with_all, overlay):
    for kind, it in rendered.get(overlay, with_all).items():
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
    """What every pod is made from that an object makes."""
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


def peers(objects: dict[str, Any]) -> list[dict[str, Any]]:
    """Who may reach the API."""
    (rule,) = objects["NetworkPolicy"]["spec"]["ingress"]
    return rule["from"]


def ports_out(objects: dict[str, Any]) -> set[int]:
    """To which a pod may connect anywhere."""
    rules = objects["NetworkPolicy"]["spec"]["egress"]
    assert not any("to" in rule for rule in rules)
    return {port["port"] for rule in rules for port in rule["ports"]}


def namespace(name: str) -> dict[str, Any]:
    return {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}


CLIENTS = {
    "podSelector": {
        "matchExpressions": [{"key": "krea2-client", "operator": "In", "values": ["true"]}]
    }
}


def test_who_reaches_the_pods_is_who_is_there(rendered, with_all):
    assert peers(rendered["gpu"]) == [CLIENTS, namespace("monitoring"), namespace("traefik")]
    assert peers(rendered["cpu-demo"]) == [CLIENTS]
    assert peers(with_all) == [CLIENTS, namespace("monitoring")]


@pytest.mark.parametrize("peer", [namespace("gateway"), {"ipBlock": {"cidr": "10.0.0.0/8"}}])
def test_an_ingress_controller_may_be_a_namespace_or_addresses(render, peer):
    operation = {"op": "add", "path": "/spec/ingress/0/from/-", "value": peer}
    patch = {"target": {"kind": "NetworkPolicy"}, "patch": yaml.safe_dump([operation])}
    objects = render("cpu-demo", patches=[patch])
    assert peers(objects) == [CLIENTS, peer]
    kubernetes_validate.validate(objects["NetworkPolicy"], KUBERNETES, strict=True)


def test_pods_reach_names_and_https_and_what_their_components_need(rendered, with_all):
    usual = {53, 5353, 443}
    assert ports_out(rendered["gpu"]) == ports_out(rendered["cpu-demo"]) == usual
    assert ports_out(with_all) == usual | {4317, 4318, 9000}


def test_what_components_set_is_reached(with_all, monkeypatch):
    variables = {it["name"]: it for it in container(with_all)["env"]}
    assert len(variables) == len(container(with_all)["env"])
    for name, it in variables.items():
        if name.startswith("KREA2_SERVE_"):
            monkeypatch.setenv(name, it["value"])
    settings = load_settings(container(with_all)["args"])
    assert settings.storage == "s3://krea2-images"
    for url in (settings.otlp_endpoint, settings.storage_options["endpoint_url"]):
        assert urlsplit(url).port in ports_out(with_all)


def test_on_openshift_the_cluster_chooses_the_user(with_all):
    security = pod(with_all)["securityContext"]
    assert security == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}


def test_probes_and_the_service_go_by_a_port_that_the_variable_alone_sets(render):
    variable = {"name": "KREA2_SERVE_PORT", "value": "8080"}
    containers = [{"name": "server", "env": [variable]}]
    patch = {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": "krea2"},
        "spec": {"template": {"spec": {"containers": containers}}},
    }
    for overlay in OVERLAYS:
        objects = render(overlay, patches=[{"patch": yaml.safe_dump(patch)}])
        only = container(objects)
        assert variable in only["env"]
        assert only["ports"] == [{"name": "http", "containerPort": 8080}]
        probes = [only[f"{name}Probe"] for name in ("startup", "readiness", "liveness")]
        assert {probe["httpGet"]["port"] for probe in probes} == {"http"}
        assert objects["Service"]["spec"]["ports"][0]["targetPort"] == "http"


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
