"""What the application can be told, and what it refuses."""

import pytest
from pydantic import ValidationError

from krea2_server.ray.arguments import Arguments

OPEN = {"allow_anonymous": True}


def test_settings_are_those_of_krea2_serve():
    arguments = Arguments(settings={**OPEN, "max_n": 3, "engine": {"max_queue_s": 20}})
    settings = arguments.server_settings()
    assert settings.max_n == 3
    assert settings.engine.max_queue_s == 20
    assert settings.storage == "none"


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({}, "there are no API keys"),
        ({"settings": {**OPEN, "port": 1}}, "settings.port: has no effect here; http_options.port"),
        ({"settings": {**OPEN, "replicas": 2}}, "settings.replicas: .* max_replicas"),
        ({"settings": {**OPEN, "no_such": 2}}, "no_such"),
        ({"settings": {**OPEN, "max_n": 11}}, "max_n"),
        ({"settings": OPEN, "min_replicas": 2}, "max_replicas: must be at least min_replicas"),
        ({"settings": OPEN, "min_replicas": 0}, "min_replicas"),
        ({"settings": OPEN, "target_queue_s": 0}, "target_queue_s"),
        ({"settings": OPEN, "unknown": 1}, "unknown"),
        ({"settings": {**OPEN, "storage": "images"}, "http_replicas": 2}, "settings.storage"),
    ],
)
def test_what_has_no_effect_or_is_wrong_is_refused_by_name(arguments, text):
    with pytest.raises(ValidationError, match=text):
        Arguments(**arguments)


@pytest.mark.parametrize(
    ("variable", "text"),
    [("KREA2_SERVE_MAX_M", "KREA2_SERVE_MAX_M"), ("KREA2_SERVE_CONFIG", "config")],
)
def test_a_variable_that_would_be_ignored_is_refused(monkeypatch, variable, text):
    monkeypatch.setenv(variable, "4")
    with pytest.raises(ValidationError, match=text):
        Arguments(settings=OPEN)


def test_keys_in_the_environment_will_do(monkeypatch):
    monkeypatch.setenv("KREA2_SERVE_API_KEYS", "sk-0123456789abcdef")
    assert Arguments().server_settings().plain_api_keys


def test_arguments_come_before_the_variables_of_an_image(monkeypatch):
    monkeypatch.setenv("KREA2_SERVE_MODEL_PATH", "krea/Krea-2-Turbo")
    monkeypatch.setenv("KREA2_SERVE_LOG_FORMAT", "json")
    settings = Arguments(settings={**OPEN, "model_path": "mine"}).server_settings()
    assert settings.model_path == "mine"
    assert settings.log_format == "json"
