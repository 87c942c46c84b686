"""What a policy's file may say, and what is said of a wrong one."""

import pytest

from krea2_server.moderation.policy import ModerationConfigError, load_policy

EXAMPLE = """
checkers:
  - type: text-classification
    model: models/prompt-guard
    categories: {toxic: 0.5, sexual: 0.8}
    low: {toxic: 0.9}
  - type: image-classification
    model: models/nsfw-detector
    categories: {nsfw: 1}
    device: cuda:1
  - type: openai-moderations
    url: http://127.0.0.1:9000/
    model: omni-moderation-latest
    api_key_env: MODERATION_API_KEY
    checks: [image]
    categories: {sexual/minors: 0.2}
    low: {}
on_error: allow
timeout_s: 5
"""

TEXT = "{type: text-classification, model: m, categories: {toxic: 0.5}"
ADDRESS = "{type: openai-moderations, categories: {toxic: 0.5}"


@pytest.fixture
def policy_of(tmp_path):
    def load(text):
        file = tmp_path / "policy.yaml"
        file.write_text(text)
        return load_policy(file)

    return load


def test_all_that_can_be_said(policy_of):
    policy = policy_of(EXAMPLE)
    text, image, address = policy.checkers
    assert (policy.on_error, policy.timeout_s) == ("allow", 5)
    assert (text.name, text.checks) == ("text-classification models/prompt-guard", ("prompt",))
    assert (image.device, image.checks) == ("cuda:1", ("image",))
    assert address.name == "openai-moderations http://127.0.0.1:9000"
    assert address.model == "omni-moderation-latest"
    assert (address.api_key_env, address.checks) == ("MODERATION_API_KEY", ("image",))


def test_what_is_left_open(policy_of):
    policy = policy_of(f"checkers: [{TEXT}}}, {ADDRESS}, url: 'https://host'}}]")
    assert (policy.on_error, policy.timeout_s) == ("refuse", 10)
    assert policy.checkers[0].device == "cpu"
    assert policy.checkers[1].checks == ("prompt", "image")


def test_low_is_as_strict_as_ever_where_nothing_is_said_of_it(policy_of):
    text, image, address = policy_of(EXAMPLE).checkers
    assert text.thresholds(low=False) == {"toxic": 0.5, "sexual": 0.8}
    assert text.thresholds(low=True) == {"toxic": 0.9}
    assert image.thresholds(low=True) == {"nsfw": 1}
    assert address.thresholds(low=True) == {}


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (f"checkers: [{TEXT}, extra: 1}}]", ["checkers[0] (text-classification): extra: "]),
        (f"checkers: [{TEXT}}}]\nextra: 1", ["policy.yaml: extra: "]),
        (f"checkers: [{TEXT}, checks: [image]}}]", ["checkers[0] (text-classification): checks: "]),
        (f"checkers: [{TEXT}}}, {ADDRESS}}}]", ["checkers[1] (openai-moderations): url: "]),
        ("checkers: [{type: text, model: m}]", ["checkers[0]: ", "text-classification"]),
        ("checkers: [{model: m}]", ["checkers[0]: ", "type"]),
        ("checkers: [{type: image-classification, model: m}]", [
            "checkers[0] (image-classification): categories: "]),
        ("checkers: []", ["policy.yaml: checkers: "]),
        ("", ["policy.yaml: "]),
        ("on_error: allow", ["policy.yaml: checkers: "]),
        (f"checkers: [{TEXT}, low: {{lewd: 0.5}}}}]", [
            "checkers[0] (text-classification): low.lewd: is not in categories"]),
        (f"checkers: [{TEXT}}}]\non_error: maybe", ["policy.yaml: on_error: "]),
        (f"checkers: [{TEXT}}}]\ntimeout_s: 0", ["policy.yaml: timeout_s: "]),
        (f"checkers: [{TEXT}}}]\ntimeout_s: .inf", ["policy.yaml: timeout_s: "]),
        (f"checkers: [{TEXT}}}]\ncheckers: []", ["line 2: checkers is there twice"]),
        ("checkers: [", ["policy.yaml: line 1: "]),
        (f"checkers: [{ADDRESS}, url: 'ftp://host'}}]", ["url: must begin with http"]),
        (f"checkers: [{ADDRESS}, url: 'http://u:p@host'}}]", ["url: must have no user"]),
        (f"checkers: [{ADDRESS}, url: 'https://host/v1/'}}]", ["url: must be without /v1"]),
    ],
)  # fmt: skip
def test_a_wrong_file_is_named_with_the_checker_and_the_field(policy_of, text, parts):
    with pytest.raises(ModerationConfigError) as caught:
        policy_of(text)
    message = str(caught.value)
    assert "policy.yaml: " in message
    assert "\n" not in message
    for part in parts:
        assert part in message


@pytest.mark.parametrize("value", ["0", "1.01", "-1", ".nan", "yes", "'0.5'", "high"])
@pytest.mark.parametrize("group", ["categories", "low"])
def test_thresholds_are_numbers_above_0_up_to_1(policy_of, group, value):
    text = f"checkers: [{{type: text-classification, model: m, {group}: {{toxic: {value}}}"
    if group == "low":
        text += ", categories: {toxic: 1}"
    with pytest.raises(ModerationConfigError, match=rf"\(text-classification\): {group}.toxic: "):
        policy_of(text + "}]")


def test_a_file_that_cannot_be_read(tmp_path):
    with pytest.raises(ModerationConfigError, match=r"missing\.yaml: No such file"):
        load_policy(tmp_path / "missing.yaml")
    (file := tmp_path / "latin.yaml").write_bytes(b"checkers: \xe9")
    with pytest.raises(ModerationConfigError, match=r"latin\.yaml: is not UTF-8"):
        load_policy(file)
