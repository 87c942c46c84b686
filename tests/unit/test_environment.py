import dataclasses

import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.environment import Environment, read_environment
from krea2_srt.errors import ConfigError
from krea2_srt.request import RequestLimits
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.setting import settings_of


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


DECLARED = {
    f"KREA2_SRT_{name.upper()}": declared
    for config in (EngineConfig, RunnerConfig)
    for name, declared in settings_of(config).items()
}
NUMBERS = sorted(name for name, one in DECLARED.items() if not isinstance(one.default, str))
WHOLE = [name for name in NUMBERS if isinstance(DECLARED[name].default, int)]
CAN_BE_ZERO = [name for name in NUMBERS if DECLARED[name].least == 0]


def test_an_empty_environment_gives_the_defaults():
    assert read_environment({}) == Environment(EngineConfig(), RunnerConfig())
    assert EngineConfig().limits == RequestLimits()


def test_values_have_the_types_of_their_defaults():
    """`tests.unit.server.test_every_setting` has all of them, in all ways."""
    found = read_environment(
        {"KREA2_SRT_MAX_QUEUE_S": "30", "KREA2_SRT_MAX_SIDE": "2048", "KREA2": "no prefix"}
    )
    assert found.engine == EngineConfig(max_queue_s=30.0, max_side=2048)
    assert (type(found.engine.max_queue_s), type(found.engine.max_side)) == (float, int)
    assert found.engine.limits == RequestLimits(max_side=2048)


def test_all_limits_of_requests_but_one_are_settings():
    limits = {field.name for field in dataclasses.fields(RequestLimits)} - {"max_prompt"}
    others = {name: getattr(RequestLimits(), name) + 1 for name in limits}
    assert EngineConfig(**others).limits == RequestLimits(**others)


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("KREA2_SRT_MAX_PAUSED_STEPS", "5")
    assert read_environment().engine.max_paused_steps == 5


@pytest.mark.parametrize("variable", NUMBERS)
@pytest.mark.parametrize("text", ["many", "", "-1", "nan", "inf"])
def test_a_wrong_number_names_its_variable_and_the_value(variable, text):
    with pytest.raises(ConfigError) as error:
        read_environment({variable: text})
    assert str(error.value).startswith(f"{variable}: must be ")
    assert (text or "''") in str(error.value)


@pytest.mark.parametrize("variable", [v for v in NUMBERS if v not in CAN_BE_ZERO])
def test_zero_is_no_limit(variable):
    with pytest.raises(ConfigError, match=rf"^{variable}: must be greater than "):
        read_environment({variable: "0"})


@pytest.mark.parametrize("variable", CAN_BE_ZERO)
def test_zero_can_be_where_a_setting_says_so(variable):
    assert "KREA2_SRT_MAX_GUIDANCE" in CAN_BE_ZERO  # guidance can be forbidden
    read_environment({variable: "0"})


@pytest.mark.parametrize("variable", WHOLE)
def test_counts_are_whole_numbers(variable):
    with pytest.raises(ConfigError, match=rf"^{variable}: must be a whole number, got '2\.5'"):
        read_environment({variable: "2.5"})


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
    assert all(variable in str(error.value) for variable in DECLARED)


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
