"""Clients that are not installed."""

import pytest

from tests.server.clients import packages


@pytest.mark.parametrize("script", ["node/openai.mjs", "python/dalle_wrapper.py"])
def test_a_missing_client_fails_and_does_not_skip(tmp_path, monkeypatch, script):
    monkeypatch.setattr(packages, "ROOT", tmp_path)
    monkeypatch.setattr(packages, "ENVIRONMENT", tmp_path / ".venv-clients")
    with pytest.raises(pytest.fail.Exception, match=r"no \.venv-clients/bin/.*make test-slow"):
        packages.run(script)
