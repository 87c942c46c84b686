"""Every setting, in every way: by a flag, a variable and a file, and where it goes from there.

The values are made from each setting's type, bounds and choices: a new one needs no line here.
"""

import dataclasses
import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from functools import cache
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, get_args

import pytest
import yaml
from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo

from krea2_server.settings import Settings, load_settings
from krea2_srt.engine.config import EngineConfig
from krea2_srt.environment import read_environment
from krea2_srt.errors import ConfigError
from krea2_srt.runner.config import RunnerConfig
from krea2_srt.setting import Setting, settings_of

CONFIGS = {"engine": EngineConfig, "runner": RunnerConfig}

BESIDE = {
    "host": ["--allow-anonymous"],
    "storage_options": ["--storage=s3://bucket/images"],
    "gpu": ["--plan"],
}
"""Flags without which these settings cannot be other than they are by default."""

ALSO = {"lora_dir": "runner.lora_dir", "recipe": "runner.recipe"}
"""Settings that are one of the scheduler processes' under a shorter name."""

WRONG = ("nonsense", "-1", "[")
"""Each setting is given those of these that it cannot be; some take any text."""


def leaves(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from leaves(field.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field


FIELDS = dict(leaves(Settings))
DECLARED: dict[str, Setting] = {
    f"{part}.{name}": declared
    for part, config in CONFIGS.items()
    for name, declared in settings_of(config).items()
}


@cache
def adapter(name: str) -> TypeAdapter:
    field = FIELDS[name]
    bounds = field.metadata
    return TypeAdapter(Annotated[field.annotation, *bounds] if bounds else field.annotation)


def refuses(name: str, value: object) -> bool:
    """Whether a setting cannot have a value."""
    try:
        found = adapter(name).validate_python(value)
    except ValidationError:
        return True
    return name in DECLARED and bool(DECLARED[name].problem(found))


def other_values(name: str) -> Iterator[object]:
    """Values of some types, among them one that a setting can have and has not by default."""
    field = FIELDS[name]
    declared = DECLARED.get(name)
    default = declared.default if declared else field.default
    if isinstance(default, bool):
        yield not default
    elif isinstance(default, (int, float)):
        yield from (default + 1, default - 1)
    elif isinstance(default, list):
        yield from (["some-text", "other"], ["tcp://some.host:1", "tcp://other.host:2"])
        yield ["10.0.0.0/8", "::1"]
    else:
        options = declared.choices if declared else get_args(field.annotation)
        yield from (one for one in options if isinstance(one, str) and one != default)
        yield from ("some-text", "http://some.host:1", "512x512", {"some": "text"}, "3", "4090")


def value_of(name: str, tmp_path: Path) -> Any:
    if Path in (FIELDS[name].annotation, *get_args(FIELDS[name].annotation)):
        (tmp_path / "empty.yaml").write_text("{}")
        return str(tmp_path / "empty.yaml")
    return next(value for value in other_values(name) if not refuses(name, value))


def text_of(value: object) -> str:
    """A value as a flag and a variable have it."""
    if isinstance(value, list):
        return ",".join(value)
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


# The ways, each from a setting's name and value to the flags of krea2-serve.


def by_flag(name: str, value: object, tmp_path: Path, set_variable: Callable) -> list[str]:
    flag = name.replace("_", "-")
    if isinstance(value, bool):
        return [f"--{flag}" if value else f"--no-{flag}"]
    return [f"--{flag}={text_of(value)}"]


def by_variable(name: str, value: object, tmp_path: Path, set_variable: Callable) -> list[str]:
    set_variable("KREA2_SERVE_" + name.replace(".", "__").upper(), text_of(value))
    return []


def by_file(name: str, value: object, tmp_path: Path, set_variable: Callable) -> list[str]:
    for part in reversed(name.split(".")):
        value = {part: value}
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(value))
    return ["--config", str(tmp_path / "settings.yaml")]


CASES = [
    pytest.param(name, way, id=f"{name}-{way.__name__}")
    for name in FIELDS
    for way in (by_flag, by_variable, by_file)
    if (name, way) != ("config", by_file)  # no file names another
]


@pytest.fixture(autouse=True)
def no_variables(monkeypatch):
    for variable in os.environ:
        if variable.startswith("KREA2_") or variable == "CUDA_VISIBLE_DEVICES":
            monkeypatch.delenv(variable)


def plain(settings: Settings) -> dict[str, Any]:
    """All values, by name."""
    found = {}
    for name in FIELDS:
        value: Any = settings
        for part in name.split("."):
            value = getattr(value, part)
        value = value.get_secret_value() if isinstance(value, SecretStr) else value
        found[name] = str(value) if isinstance(value, Path) else value
    return found


def scheduler_values(variables: dict[str, str]) -> dict[str, Any]:
    """What a scheduler process reads, by the names that krea2-serve has for it."""
    return {
        f"{part}.{name}": value
        for part, values in dataclasses.asdict(read_environment(variables)).items()
        for name, value in values.items()
    }


def changes(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in new.items() if value != old[name]}


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_setting_arrives_whichever_way_it_comes(name, way, tmp_path, monkeypatch):
    value = value_of(name, tmp_path)
    before = load_settings(BESIDE.get(name, []))
    settings = load_settings(
        [*BESIDE.get(name, []), *way(name, value, tmp_path, monkeypatch.setenv)]
    )
    changed = changes(plain(before), plain(settings))
    if way is by_file:
        del changed["config"]
    assert changed == {name: value}
    read = changes(scheduler_values({}), scheduler_values(settings.scheduler_environment))
    told = ALSO.get(name, name)
    assert read == ({told: value} if told in DECLARED else {})


@pytest.mark.parametrize("name", DECLARED)
def test_a_scheduler_process_without_krea2_serve_reads_the_same(name, tmp_path):
    value = value_of(name, tmp_path)
    variable = "KREA2_SRT_" + name.partition(".")[2].upper()
    assert changes(scheduler_values({}), scheduler_values({variable: text_of(value)})) == {
        name: value
    }
    for wrong in WRONG:
        if refuses(name, wrong):
            with pytest.raises(ConfigError, match=f"^{variable}: must be .*{re.escape(wrong)}"):
                read_environment({variable: wrong})


@pytest.mark.parametrize(("name", "way"), CASES)
def test_a_value_that_cannot_be_is_refused_by_name(name, way, tmp_path, monkeypatch):
    # A value that is no text can only be in a file, where texts and numbers are told apart.
    wrong = (*WRONG, {"a": {}}) if way is by_file else WRONG
    for value in wrong:
        if not refuses(name, value):
            continue
        flags = way(name, value, tmp_path, monkeypatch.setenv)
        with pytest.raises(ConfigError) as caught:
            load_settings([*BESIDE.get(name, []), *flags])
        message = str(caught.value)
        named = message.removeprefix("argument --").replace("-", "_")
        assert re.match(rf"{name}\b", named), message
        assert "\n" not in message


TEXTS = ("None", "null", "", "true", "a=1", "{}", '{"a": 1}', "[]", "a,b", "7")
"""Texts that a way may be tempted to read in a way of its own."""


@pytest.mark.parametrize("name", FIELDS)
def test_a_text_is_the_same_whichever_way_it_comes(name, tmp_path):
    def outcome(way: Callable, text: str) -> object:
        with pytest.MonkeyPatch.context() as patch:
            flags = [*BESIDE.get(name, []), *way(name, text, tmp_path, patch.setenv)]
            try:
                return plain(load_settings(flags))[name]
            except ConfigError as error:
                # A choice is refused by the parser of the flags, in words of its own.
                named = str(error).removeprefix("argument --").replace("-", "_")
                assert re.match(rf"{name}\b", named)
                return ConfigError

    ways = [by_flag, by_variable, by_file]
    if name == "config":
        ways.remove(by_file)  # no file names another
    if isinstance(FIELDS[name].default, bool):
        ways.remove(by_flag)  # it has no text
    for text in TEXTS:
        first, *others = (outcome(way, text) for way in ways)
        assert others == [first] * len(others), text


@pytest.fixture(scope="module")
def help_text() -> str:
    """What ``--help`` prints, in one line."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setenv("COLUMNS", "10000")  # a hyphen is where a line may end
        with pytest.raises(SystemExit) as ended:
            load_settings(["--help"])
    assert ended.value.code == 0
    return " ".join(printed.getvalue().split())


@pytest.mark.parametrize("name", FIELDS)
def test_help_says_what_a_setting_is_for_and_its_default(name, help_text):
    flag, description = f"--{name.replace('_', '-')}", FIELDS[name].description
    (described,) = re.findall(
        rf" {flag}(?: \S+|, --no-\S+) {re.escape(description)}(.*?)(?= --|$)", help_text
    )
    if name in DECLARED:
        assert DECLARED[name].help in description
        assert description.endswith(DECLARED[name].default_text)
        assert all(choice in description for choice in DECLARED[name].choices)
    elif isinstance(FIELDS[name].default, (int, float)):
        assert described == f" (default: {FIELDS[name].default})"


def test_settings_of_all_kinds_are_tried(tmp_path):
    values = {name: value_of(name, tmp_path) for name in FIELDS}
    assert set(map(type, values.values())) == {str, int, float, bool, list, dict}
    assert {"port", "model_aliases", "engine.max_turn_ms", "runner.attention"} <= values.keys()
    assert DECLARED.keys() <= values.keys()
