import dataclasses

import pytest

from krea2_srt.engine.config import EngineConfig
from krea2_srt.engine.request import RequestLimits
from krea2_srt.errors import ConfigError

VARIABLES = {
    "KREA2_SRT_POLICY": ("edf", "edf"),
    "KREA2_SRT_MAX_TURN_MS": ("150.5", 150.5),
    "KREA2_SRT_MAX_PACK_TOKENS": ("8192", 8192),
    "KREA2_SRT_MAX_PACK_SEQUENCES": ("7", 7),
    "KREA2_SRT_MAX_ACTIVE_SEQUENCES": ("12", 12),
    "KREA2_SRT_MAX_HELD_STEPS": ("1", 1),
    "KREA2_SRT_MAX_QUEUE_S": ("30", 30.0),
    "KREA2_SRT_MAX_SIDE": ("2048", 2048),
    "KREA2_SRT_MAX_PIXELS": ("1048576", 1048576),
    "KREA2_SRT_MAX_STEPS": ("60", 60),
    "KREA2_SRT_MAX_IMAGES": ("4", 4),
    "KREA2_SRT_MAX_GUIDANCE": ("7.5", 7.5),
}
NUMBERS = sorted(VARIABLES.keys() - {"KREA2_SRT_POLICY"})


def test_an_empty_environment_gives_the_defaults():
    assert EngineConfig.from_environment({}) == EngineConfig()
    assert EngineConfig().limits == RequestLimits()


def test_every_field_has_its_variable():
    texts = {variable: text for variable, (text, _) in VARIABLES.items()}
    config = EngineConfig.from_environment(texts | {"PATH": "/bin", "KREA2": "no prefix"})
    values = {variable: value for variable, (_, value) in VARIABLES.items()}
    for field in dataclasses.fields(EngineConfig):
        value = getattr(config, field.name)
        assert value == values.pop("KREA2_SRT_" + field.name.upper())
        assert type(value) is type(getattr(EngineConfig(), field.name))
    assert not values
    assert config.limits == RequestLimits(2048, 1048576, 60, 4, 7.5)


def test_the_environment_of_the_process_is_the_default(monkeypatch):
    monkeypatch.setenv("KREA2_SRT_MAX_HELD_STEPS", "5")
    assert EngineConfig.from_environment().max_held_steps == 5


@pytest.mark.parametrize("variable", NUMBERS)
@pytest.mark.parametrize("text", ["many", "", "-1", "nan"])
def test_a_wrong_number_names_its_variable_and_the_value(variable, text):
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_environment({variable: text})
    assert str(error.value).startswith(f"{variable}: must be ")
    assert (text or "''") in str(error.value)


@pytest.mark.parametrize("variable", [v for v in NUMBERS if v != "KREA2_SRT_MAX_GUIDANCE"])
@pytest.mark.parametrize("text", ["0", "inf"])
def test_zero_and_infinity_are_no_limits(variable, text):
    with pytest.raises(ConfigError, match=f"^{variable}: must be "):
        EngineConfig.from_environment({variable: text})


@pytest.mark.parametrize("variable", [v for v in NUMBERS if isinstance(VARIABLES[v][1], int)])
def test_counts_are_whole_numbers(variable):
    with pytest.raises(ConfigError, match=rf"^{variable}: must be a whole number, got '2\.5'"):
        EngineConfig.from_environment({variable: "2.5"})


def test_guidance_can_be_forbidden():
    assert EngineConfig.from_environment({"KREA2_SRT_MAX_GUIDANCE": "0"}).max_guidance == 0


def test_an_unknown_policy_names_the_known_ones():
    with pytest.raises(ConfigError, match=r"^KREA2_SRT_POLICY: .*fcfs, srpt, edf, got 'lifo'"):
        EngineConfig.from_environment({"KREA2_SRT_POLICY": "lifo"})
    with pytest.raises(ConfigError, match=r"^policy: .*'lifo'"):
        EngineConfig(policy="lifo")


def test_an_unknown_variable_is_named_with_those_that_exist():
    with pytest.raises(ConfigError) as error:
        EngineConfig.from_environment({"KREA2_SRT_MAX_TURNS_MS": "5"})
    assert str(error.value).startswith("KREA2_SRT_MAX_TURNS_MS: is not known")
    assert all(variable in str(error.value) for variable in VARIABLES)


def test_a_config_does_not_change():
    with pytest.raises(dataclasses.FrozenInstanceError):
        EngineConfig().max_turn_ms = 5.0
