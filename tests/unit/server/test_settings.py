"""One configuration from flags, the environment and a file, whose mistakes name themselves."""

import json
import subprocess

import pytest

from krea2_server.ray.arguments import RaySettings
from krea2_server.scheduler_settings import EngineSettings
from krea2_server.settings import Settings, load_settings
from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError
from tests.server.serving import SERVE
from tests.unit.test_environment import service_links


def test_flags_come_before_the_environment_before_the_file(tmp_path, monkeypatch):
    file = tmp_path / "config.yaml"
    file.write_text("port: 1\nmax_n: 1\nmodel_path: from/file\nengine: {policy: srpt}\n")
    monkeypatch.setenv("KREA2_SERVE_PORT", "2")
    monkeypatch.setenv("KREA2_SERVE_MAX_N", "2")
    settings = load_settings(["--config", str(file), "--port", "3"])
    assert (settings.port, settings.max_n, settings.model_path) == (3, 2, "from/file")
    assert settings.engine.policy == "srpt"
    assert settings.replicas == 1


def test_on_and_off_need_no_quotes_in_the_file(tmp_path):
    (tmp_path / "config.yaml").write_text("runner: {cuda_graphs: off, fused_mlp: on}\n")
    runner = load_settings(["--config", str(tmp_path / "config.yaml")]).runner
    assert (runner.cuda_graphs, runner.fused_mlp) == ("off", "on")


def test_the_file_can_be_named_in_the_environment(tmp_path, monkeypatch):
    (tmp_path / "config.yaml").write_text("max_n: 4\n")
    monkeypatch.setenv("KREA2_SERVE_CONFIG", str(tmp_path / "config.yaml"))
    assert load_settings([]).max_n == 4


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--port", "many"], "port"),
        (["--port", "99999"], "port"),
        (["--max-n", "11"], "max_n"),
        (["--replicas", "0"], "replicas"),
        (["--no-such-flag", "1"], "--no-such-flag"),
        (["--engine.policy", "lifo"], "engine.policy:"),
        (["--engine.max-turn-ms", "-1"], "engine.max_turn_ms:"),
        (["--runner.attention", "fa9"], "runner.attention: must be one of auto, sdpa"),
        (["--sglang-args", "'unbalanced"], "sglang_args"),
        (["--config", "/nonexistent.yaml"], "config"),
        (["--config", ""], "config: must be the name of a file"),
        (["--api-keys-file", ""], "api_keys_file: must be the name of a file"),
        (["--storage=s3://b/p", "--storage-options", '{"a": 1, "a": 2}'], "a is there twice"),
        (["--host", "0.0.0.0"], "--allow-anonymous"),
        (["--host", "0.0.0.0", "--api-keys", " , "], "--allow-anonymous"),
        (["--log-level", "loud"], "log_level"),
        (["--drain-timeout-s", "inf"], "drain_timeout_s"),
        (["--url-expiry-s", "nan"], "url_expiry_s"),
        (["--requests-per-minute", "inf"], "requests_per_minute"),
        (["--public-url", "nonsense"], "public_url"),
        (["--public-url", "http://["], "public_url: must be http://host:port/path"),
        (["--public-url", "http://h:99999"], "public_url: must be http://host:port/path"),
        (["--otlp-endpoint", "collector:4318"], "otlp_endpoint"),
        (["--engine-endpoints", "nonsense"], "engine_endpoints"),
        (["--engine-endpoints", "tcp://h:1", "--replicas", "2"], "replicas: has no effect"),
        (["--engine-endpoints", "tcp://h:1", "--engine.policy", "srpt"], "engine: has no effect"),
        (["--storage", "s3://b/p", "--max-storage-bytes", "9"], "max_storage_bytes: has no"),
        (["--storage", "/tmp", "--storage-options", '{"a": 1}'], "storage_options: has no effect"),
    ],
)
def test_a_bad_value_names_itself(flags, named):
    with pytest.raises(ConfigError) as caught:
        load_settings(flags)
    assert named in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_name_in_the_environment_or_the_file_is_an_error(tmp_path, monkeypatch):
    for name in ("prot", "config"):
        (tmp_path / "config.yaml").write_text(f"{name}: 4\n")
        with pytest.raises(ConfigError, match=f"unknown setting {name}"):
            load_settings(["--config", str(tmp_path / "config.yaml")])
    for variable in (
        "KREA2_SERVE_PROT",
        "KREA2_SERVE_PORT__X",
        "KREA2_SERVE_ENGINE__POLITIK",
        "KREA2_SERVE_RUNNER__ATENTION",
        "KREA2_SERVE_RUNNER__KERNELS__X",
    ):
        monkeypatch.setenv(variable, "4")
        with pytest.raises(ConfigError, match=f"unknown setting {variable}"):
            load_settings([])
        monkeypatch.delenv(variable)


@pytest.mark.parametrize(
    ("text", "items"),
    [
        ("a,b", ["a", "b"]),
        (" a , b ", ["a", "b"]),
        ('["a", "b"]', ["a", "b"]),
        ('["a,b"]', ["a,b"]),
        ("true,1", ["true", "1"]),
        ("", []),
        ("[]", []),
    ],
)
def test_a_list_is_the_same_as_a_flag_a_variable_and_a_text_in_the_file(
    text, items, tmp_path, monkeypatch
):
    (tmp_path / "config.yaml").write_text(json.dumps({"model_aliases": text}))
    assert load_settings(["--config", str(tmp_path / "config.yaml")]).model_aliases == items
    assert load_settings(["--model-aliases", text]).model_aliases == items
    monkeypatch.setenv("KREA2_SERVE_MODEL_ALIASES", text)
    assert load_settings([]).model_aliases == items


def test_flags_of_lists_may_be_repeated():
    flags = ["--model-aliases", "a", "--model-aliases", '["b", "c,d"]', "--model-aliases", "e,f"]
    assert load_settings(flags).model_aliases == ["a", "b", "c,d", "e", "f"]


def test_flags_of_objects_may_be_repeated():
    flags = ["--storage-options", '{"a": 1}', "--storage-options", '{"b": "None"}']
    settings = load_settings(["--storage=s3://bucket/images", *flags])
    assert settings.storage_options == {"a": 1, "b": "None"}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("model_aliases", '["a"'),
        ("model_aliases", '["a"] b'),
        ("model_aliases", "[" * 5000),
        ("storage_options", "endpoint"),
        ("storage_options", "{"),
        ("storage_options", '{"a":' * 5000),
        ("storage_options", "a=1"),
        ("storage_options", '{"a": 1} {"b": 2}'),
        ("engine", "policy"),
    ],
)
def test_what_is_no_json_is_named(name, text, monkeypatch):
    monkeypatch.setenv(f"KREA2_SERVE_{name.upper()}", text)
    with pytest.raises(ConfigError, match=rf"^{name}: must be "):
        load_settings([])
    monkeypatch.delenv(f"KREA2_SERVE_{name.upper()}")
    with pytest.raises(ConfigError, match=rf"^{name}: must be "):
        load_settings([f"--{name.replace('_', '-')}", text])


@pytest.mark.parametrize("host", ["10.0.0.1", "fd00::1"])
@pytest.mark.parametrize(
    "service", ["krea2-serve", "krea2-srt", "krea2-serve-metrics", "krea2-serve-engine--policy"]
)
def test_service_links_of_kubernetes_are_no_settings(service, host, monkeypatch):
    plain = load_settings([])
    for variable, text in service_links(service, host).items():
        monkeypatch.setenv(variable, text)
    assert load_settings([]) == plain
    assert RaySettings().model_dump() == plain.model_dump()
    assert load_settings(["--port", "5"]).port == 5


def test_a_port_that_is_neither_number_nor_service_link_is_refused(monkeypatch):
    monkeypatch.setenv("KREA2_SERVE_PORT", "http://10.0.0.1:80")
    with pytest.raises(ConfigError, match=r"^port: "):
        load_settings([])


def test_of_two_configuration_files_the_last_counts(tmp_path):
    for name, n in (("a", 1), ("b", 2)):
        (tmp_path / name).write_text(f"max_n: {n}\n")
    assert load_settings([f"--config={tmp_path / 'a'}", "--config", str(tmp_path / "b")]).max_n == 2


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_loopback_is_open_without_keys(host):
    assert load_settings(["--host", host]).host == host


def test_other_addresses_are_open_with_keys_or_when_told(monkeypatch):
    assert load_settings(["--host", "0.0.0.0", "--allow-anonymous"]).allow_anonymous
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", "sk-0123456789abcdef")
    assert load_settings(["--host", "0.0.0.0"]).host == "0.0.0.0"


def test_secrets_are_not_shown(monkeypatch):
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", "sk-0123456789abcdef")
    monkeypatch.setenv("KREA2_SERVE_STORAGE_KEY", "fedcba9876543210")
    text = repr(load_settings([])) + str(load_settings([]).model_dump())
    assert "0123456789abcdef" not in text
    assert "fedcba9876543210" not in text


def test_the_engine_reads_what_is_set_here():
    settings = Settings(engine=EngineSettings(policy="srpt", max_side=512))
    config = read_environment(settings.scheduler_environment).engine
    assert (config.policy, config.max_side) == ("srpt", 512)
    settings = load_settings(["--runner.cuda-graphs", "off"])
    assert read_environment(settings.scheduler_environment).runner.cuda_graphs == "off"
    with pytest.raises(ConfigError, match=r"^runner.kernels: .*'cuda'"):
        load_settings(["--runner.kernels", "cuda"])


def test_more_replicas_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert load_settings(["--replicas", "2"]).replicas == 2
    with pytest.raises(ConfigError, match="replicas"):
        load_settings(["--replicas", "3"])


def test_a_mistake_is_one_line_and_exit_code_2():
    result = subprocess.run([SERVE, "--port", "x"], capture_output=True, text=True, timeout=300)
    assert result.returncode == 2
    assert result.stderr.count("\n") == 1
    assert "krea2-serve: error: port:" in result.stderr


@pytest.mark.parametrize("name", ["int8", "fp8"])
def test_quantization_is_an_option_of_sglang(name, monkeypatch, tmp_path):
    assert load_settings([]).sglang_options == []
    settings = load_settings(["--quantization", name, "--sglang-args", "--log-level debug"])
    assert settings.sglang_options == ["--quantization", name, "--log-level", "debug"]
    (tmp_path / "some.yaml").write_text(f"quantization: {name}\n")
    settings = load_settings(["--config", str(tmp_path / "some.yaml")])
    assert settings.sglang_options == ["--quantization", name]
    monkeypatch.setenv("KREA2_SERVE_QUANTIZATION", name)
    assert load_settings([]).sglang_options == ["--quantization", name]


def test_another_quantization_is_refused():
    with pytest.raises(ConfigError, match=r"quantization: .*'none', 'int8' or 'fp8'"):
        load_settings(["--quantization", "fp4"])
    endpoints = ["--engine-endpoints", "tcp://127.0.0.1:5555"]
    with pytest.raises(ConfigError, match="quantization: has no effect with engine_endpoints"):
        load_settings([*endpoints, "--quantization", "fp8"])
    for sglangs in ("--quantization fp8", "--quantization=fp8"):
        with pytest.raises(ConfigError, match="quantization: has no effect with --quantization of"):
            load_settings(["--quantization", "int8", f"--sglang-args={sglangs}"])


def test_a_gpu_by_its_number_in_a_file(tmp_path):
    (tmp_path / "some.yaml").write_text("plan: true\ngpu: 4090\n")
    assert load_settings(["--config", str(tmp_path / "some.yaml")]).gpu == "4090"
