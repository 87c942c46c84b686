import dataclasses

import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.environment import Environment, read_environment
from krea2_srt.errors import ConfigError
from krea2_srt.request import RequestLimits
from krea2_srt.runner.config import RunnerConfig


def service_links(service: str, host: str = "10.0.0.1") -> dict[str, str]:
    """What Kubernetes sets for a Service with the ports http (80) and dns (53, UDP)."""
    name = service.upper().replace("-", "_")
    address = f"[{host}]" if ":" in host else host
    found = {
        f"{name}_SERVICE_HOST": host,
        f"{name}_SERVICE_PORT": "80",
        f"{name}_SERVICE_PORT_HTTP": "80",
        f"{name}_SERVICE_PORT_DNS": "53",
        f"{name}_PORT": f"tcp://{address}:80",
    }
    for number, protocol in (("80", "tcp"), ("53", "udp")):
        port = f"{name}_PORT_{number}_{protocol.upper()}"
        found |= {
            port: f"{protocol}://{address}:{number}",
            f"{port}_PROTO": protocol,
            f"{port}_PORT": number,
            f"{port}_ADDR": host,
        }
    return found


VARIABLES = {
    "KREA2_SRT_POLICY": ("edf", "edf"),
    "KREA2_SRT_MAX_TURN_MS": ("150.5", 150.5),
    "KREA2_SRT_MAX_PACK_TOKENS": ("8192", 8192),
    "KREA2_SRT_MAX_PACK_SEQUENCES": ("7", 7),
    "KREA2_SRT_MAX_ACTIVE_SEQUENCES": ("12", 12),
    "KREA2_SRT_MAX_PAUSED_STEPS": ("1", 1),
    "KREA2_SRT_MAX_QUEUE_S": ("30", 30.0),
    "KREA2_SRT_MAX_SIDE": ("2048", 2048),
    "KREA2_SRT_MAX_PIXELS": ("1048576", 1048576),
    "KREA2_SRT_MAX_STEPS": ("60", 60),
    "KREA2_SRT_MAX_IMAGES": ("4", 4),
    "KREA2_SRT_MAX_GUIDANCE": ("7.5", 7.5),
    "KREA2_SRT_TURN_LOG": ("turns.jsonl", "turns.jsonl"),
    "KREA2_SRT_ATTENTION": ("sdpa", "sdpa"),
    "KREA2_SRT_KERNELS": ("torch", "torch"),
    "KREA2_SRT_PRODUCTS": ("sglang", "sglang"),
    "KREA2_SRT_FUSED_MLP": ("off", "off"),
    "KREA2_SRT_CUDA_GRAPHS": ("off", "off"),
    "KREA2_SRT_MAX_GRAPH_TOKENS": ("4096", 4096),
    "KREA2_SRT_WARM_UP_S": ("2.5", 2.5),
    "KREA2_SRT_TEXT_ENCODER": ("offload", "offload"),
    "KREA2_SRT_GPU_MEMORY_GIB": ("40", 40.0),
}
NUMBERS = sorted(name for name, (_, value) in VARIABLES.items() if not isinstance(value, str))
CAN_BE_ZERO = {
    "KREA2_SRT_MAX_GUIDANCE",
    "KREA2_SRT_MAX_GRAPH_TOKENS",
    "KREA2_SRT_WARM_UP_S",
    "KREA2_SRT_GPU_MEMORY_GIB",
}


def test_an_empty_environment_gives_the_defaults():
    assert read_environment({}) == Environment(EngineConfig(), RunnerConfig())
    assert EngineConfig().limits == RequestLimits()


def test_every_field_has_its_variable():
    texts = {variable: text for variable, (text, _) in VARIABLES.items()}
    found = read_environment(texts | {"PATH": "/bin", "KREA2": "no prefix"})
    values = {variable: value for variable, (_, value) in VARIABLES.items()}
    for config in (found.engine, found.runner):
        for field in dataclasses.fields(config):
            value = getattr(config, field.name)
            assert value == values.pop("KREA2_SRT_" + field.name.upper())
            assert type(value) is type(getattr(type(config)(), field.name))
    assert not values
    assert found.engine.limits == RequestLimits(2048, 1048576, 60, 4, 7.5)


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("KREA2_SRT_MAX_PAUSED_STEPS", "5")
    assert read_environment().engine.max_paused_steps == 5


@pytest.mark.parametrize("variable", NUMBERS)
@pytest.mark.parametrize("text", ["many", "", "-1", "nan"])
def test_a_wrong_number_names_its_variable_and_the_value(variable, text):
    with pytest.raises(ConfigError) as error:
        read_environment({variable: text})
    assert str(error.value).startswith(f"{variable}: must be ")
    assert (text or "''") in str(error.value)


@pytest.mark.parametrize("variable", [v for v in NUMBERS if v not in CAN_BE_ZERO])
@pytest.mark.parametrize("text", ["0", "inf"])
def test_zero_and_infinity_are_no_limits(variable, text):
    with pytest.raises(ConfigError, match=f"^{variable}: must be "):
        read_environment({variable: text})


@pytest.mark.parametrize("variable", [v for v in NUMBERS if isinstance(VARIABLES[v][1], int)])
def test_counts_are_whole_numbers(variable):
    with pytest.raises(ConfigError, match=rf"^{variable}: must be a whole number, got '2\.5'"):
        read_environment({variable: "2.5"})


def test_guidance_can_be_forbidden():
    assert read_environment({"KREA2_SRT_MAX_GUIDANCE": "0"}).engine.max_guidance == 0


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"^KREA2_SRT_POLICY: .*srpt, edf, got 'lifo'"):
        read_environment({"KREA2_SRT_POLICY": "lifo"})
    with pytest.raises(ConfigError, match=r"^policy: .*'lifo'"):
        EngineConfig(policy="lifo")


@pytest.mark.parametrize("name", ["kernels", "cuda_graphs", "text_encoder"])
def test_an_unknown_choice_names_the_known_ones(name):
    with pytest.raises(ConfigError, match=f"^KREA2_SRT_{name.upper()}: .*auto, .*got 'fast'"):
        read_environment({f"KREA2_SRT_{name.upper()}": "fast"})


def test_an_unknown_variable_is_named_with_those_that_exist():
    with pytest.raises(ConfigError) as error:
        read_environment({"KREA2_SRT_MAX_TURNS_MS": "5"})
    assert str(error.value).startswith("unknown setting KREA2_SRT_MAX_TURNS_MS")
    assert all(variable in str(error.value) for variable in VARIABLES)


def test_service_links_of_kubernetes_are_no_settings():
    for service in ("krea2-srt", "krea2-srt-metrics", "krea2-srt-max-side"):
        assert read_environment(service_links(service)) == read_environment({})


@pytest.mark.parametrize(
    ("variable", "text"),
    [
        ("KREA2_SRT_PORT", "80"),
        ("KREA2_SRT_PROT", "tcp://10.0.0.1:80"),
        ("KREA2_SRT_SERVICE_HOST", "yes"),
        ("KREA2_SRT_PORT_TCP", "tcp://10.0.0.1:80"),
        ("KREA2_SRT_SERVICE_PORTS", "80"),
    ],
)
def test_what_only_resembles_a_service_link_is_unknown(variable, text):
    with pytest.raises(ConfigError, match=f"^unknown setting {variable}; known"):
        read_environment({variable: text})


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_turn_ms = 5.0
