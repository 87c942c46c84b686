"""The image's entry point and health check: at any port, as any user of group 0."""

import os
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import httpx

from krea2_srt.testing.processes import ChildProcess, free_ports
from tests import image
from tests.e2e.restricted import restricted
from tests.programs import required, required_root
from tests.server.serving import serve

FIELDS = {"prompt": "x", "size": "64x64", "response_format": "url"}


def health(environment: dict[str, str], prefix: Sequence[str] = ()) -> subprocess.CompletedProcess:
    """The image's health check, with this Python in place of the image's."""
    _, *arguments = image.command("CMD")
    return subprocess.run(
        [*prefix, sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def test_the_health_check_asks_where_the_server_listens(shared_engine, engine, tmp_path):
    """At a port that only the server knows, past a proxy; and tells one that has gone."""
    file = tmp_path / "address"
    (name,) = [name for name in image.variables() if name.endswith("_ADDRESS_FILE")]
    environment = {**os.environ, name: str(file), "http_proxy": "http://127.0.0.1:9"}
    flags = ["--engine-endpoints", engine.endpoint]
    with serve(tmp_path, *flags, environment={name: str(file)}) as server:
        assert file.read_text() == f"{server.url}\n"
        found = health(environment)
        assert (found.returncode, found.stderr) == (0, "")
    # Nothing of it stays; and what a server that was killed has left is no sign of life.
    assert list(tmp_path.glob("address*")) == []
    assert health(environment).returncode == 1
    file.write_text(f"{server.url}\n")
    found = health(environment)
    assert found.returncode == 1
    assert found.stderr.count("\n") == 1
    assert "Connection refused" in found.stderr


class InImage(ChildProcess):
    """The image's entry point, where it may write to nothing but its cache and /tmp.

    Args:
        user: its number; the group is 0.
        cache: the image's /cache.
        engine: where an engine listens.
        port: as the image is told it, by a variable.
    """

    def __init__(self, user: int, cache: Path, engine: str, port: int, log: Path) -> None:
        variables = {name: self.inside(it) for name, it in image.variables().items()}
        variables |= {
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "PYTHONPATH": os.environ.get("PYTHONPATH", ""),
            "KREA2_SERVE_HOST": "127.0.0.1",
            "KREA2_SERVE_PORT": str(port),
            "KREA2_SERVE_ENGINE_ENDPOINTS": engine,
        }
        self.user = user
        self.variables = variables
        assigned = [f"{name}={value}" for name, value in variables.items()]
        entry = image.command("ENTRYPOINT")
        wrapper = restricted(f"{user}:0", log.parent, cache)
        super().__init__([*wrapper, "env", "-i", *assigned, *entry], log)
        self.url = f"http://127.0.0.1:{port}"

    @staticmethod
    def inside(text: str) -> str:
        """A value that names the image's folders, as they are here."""
        return re.sub(r"^/(cache|tmp)\b", r"/srv/\1", text)

    def wait_until_up(self) -> None:
        self.wait_until(self._ready, "it is ready")

    def _ready(self) -> bool:
        try:
            return httpx.get(f"{self.url}/ready").status_code == 200
        except httpx.TransportError:
            return False

    @property
    def enter(self) -> list[str]:
        """What runs a command beside it, as its user."""
        enter = [required("nsenter"), "--target", str(self.pid), "--mount"]
        return [*enter, "--setuid", str(self.user), "--setgid", "0"]


def test_users_of_group_0_take_turns_with_one_cache(shared_engine, engine, tmp_path):
    """None of them has a name or owns the cache, and each finds what the one before has left."""
    required_root()
    cache = tmp_path / "cache"
    subprocess.run([*image.cache_made_by()[:-1], cache], check=True)
    port = free_ports(["server"])["server"]
    urls = []
    for user in (1234567, 54321):
        log = tmp_path / f"{user}.log"
        with InImage(user, cache, engine.endpoint, port, log) as server:
            assert health(server.variables, server.enter).returncode == 0
            # PyTorch's caches ask for the name of a user that has none.
            name = [*server.enter, sys.executable, "-c", "import getpass; getpass.getuser()"]
            subprocess.run(name, env=server.variables, check=True)
            answer = httpx.post(f"{server.url}/v1/images/generations", json=FIELDS, timeout=300)
            assert answer.status_code == 200, answer.text
            urls.append(answer.json()["data"][0]["url"])
            assert [httpx.get(url).status_code for url in urls] == [200] * len(urls)
        assert "Permission denied" not in server.log
    owners = {file.stat().st_uid for file in cache.rglob("images-*/*")}
    assert owners == {1234567, 54321}
