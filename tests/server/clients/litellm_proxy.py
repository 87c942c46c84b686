"""LiteLLM's proxy as a process of its own, in front of a server of ours."""

import re
from pathlib import Path

import httpx

from krea2_srt.testing.processes import ChildProcess, free_ports
from tests.server.clients import packages

KEY = "sk-proxy-0123456789-0123456789"
"""LiteLLM starts with none that is short."""

UP_S = 300.0
"""It imports thousands of modules, which the first start compiles."""

PAGE = packages.ROOT / "docs/clients.md"


def page_settings(target: str) -> str:
    """The file of settings that docs/clients.md shows, for a server of ours.

    Args:
        target: its URL, without a path.
    """
    (found,) = re.findall(r"^```yaml\n(model_list:\n.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert "http://127.0.0.1:30000" in found
    return found.replace("http://127.0.0.1:30000", target)


class LiteLlmProxy(ChildProcess):
    """A context in which a proxy runs, and is up, with the settings of docs/clients.md.

    Args:
        folder: for its settings and its log.
        target: our server's URL, without a path.

    Attributes:
        url: without a path.
    """

    def __init__(self, folder: Path, target: str) -> None:
        config = folder / "config.yaml"
        config.write_text(page_settings(target))
        port = free_ports(["proxy"])["proxy"]
        self.url = f"http://127.0.0.1:{port}"
        command = packages.command("litellm", LITELLM_MASTER_KEY=KEY)
        command += ["--config", config, "--host", "127.0.0.1", "--port", str(port)]
        # How it ends is its own affair.
        super().__init__(command, folder / "litellm.log", folder=folder, exit_code=None)

    def wait_until_up(self) -> None:
        self.wait_until(self._is_alive, "it is alive", UP_S)

    def _is_alive(self) -> bool:
        try:
            return httpx.get(f"{self.url}/health/liveliness", timeout=5).status_code == 200
        except httpx.TransportError:
            return False
