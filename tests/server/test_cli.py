"""krea2-serve as a command: what it prints, and what it says of what it cannot do."""

import asyncio
import os
import re
import shutil
import signal
import socket
import subprocess
from pathlib import Path
from types import SimpleNamespace

import openai
import pytest
import zmq

from krea2_server.cli import _address_told, _listen, _say_when_ready, on_this_machine
from krea2_server.settings import Settings, load_settings
from krea2_srt.errors import ConfigError
from krea2_srt.testing.fake_engine import FakeEngine
from krea2_srt.testing.processes import free_ports
from tests.channel import PATIENCE_S, wait_until
from tests.server.serving import SERVE, serve

KEY = "sk-command-line-0123456789"


def failure(*flags: str, **environment: str) -> str:
    """The one line of a start that fails."""
    result = subprocess.run(
        [SERVE, "--port", "0", "--storage", "none", *flags],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, **environment},
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("krea2-serve: error: "), result.stderr
    assert result.stderr.count("\n") == 1
    return result.stderr


def test_the_curl_line_that_it_prints_works(shared_engine, engine, tmp_path):
    if shutil.which("curl") is None:
        pytest.skip("curl is not installed")
    flags = ["--engine-endpoints", engine.endpoint]
    with serve(tmp_path, *flags, environment={"KREA2_SERVE_API_KEYS": KEY}) as server:
        wait_until(lambda: "playground: " in server.log)
        command = re.search(r"^  (curl .*\n.*)$", server.log, re.MULTILINE)[1]
        done = subprocess.run(
            ["bash", "-c", command], capture_output=True, text=True, env={**os.environ, "KEY": KEY}
        )
        url = re.search(r'"url":"([^"]+)"', done.stdout)[1]
        shown = subprocess.run(["curl", "-s", url], capture_output=True)
        assert shown.stdout.startswith(b"\x89PNG")
        page = re.search(r"playground: (\S+)", server.log)[1]
        assert (
            b"Krea 2 playground" in subprocess.run(["curl", "-s", page], capture_output=True).stdout
        )


def test_a_port_that_is_taken_is_told_before_anything_is_started():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        said = failure("--port", str(port))
        assert f"127.0.0.1:{port} cannot be listened on: Address already in use" in said


def test_a_host_that_is_not_here_is_told():
    assert "host, port" in failure("--host", "192.0.2.1", "--allow-anonymous")


@pytest.mark.slow
def test_files_that_cannot_be_read_are_told(tmp_path):
    (tmp_path / "broken.yaml").write_text("{")
    broken = str(tmp_path / "broken.yaml")
    assert "config: " in failure("--config", broken)
    assert "api_keys_file: " in failure("--api-keys-file", broken)
    assert "moderation_policy: " in failure("--moderation-policy", broken)
    assert "KREA2_SERVE_PROT" in failure(KREA2_SERVE_PROT="1")
    assert "storage: " in failure("--storage", str(tmp_path / "broken.yaml" / "images"))
    assert "address_file: " in failure("--address-file", str(tmp_path / "nowhere" / "address"))


def test_names_that_can_be_no_hosts_or_files_are_told():
    for host in ("a..b", "x" * 64):
        with pytest.raises(ConfigError, match=rf"^host, port: {re.escape(host)}:0 cannot be"):
            _listen(Settings(host=host, port=0, allow_anonymous=True))
    for path in (Path("/"), Path()):
        with (
            pytest.raises(ConfigError, match=r"^address_file: .*: must be the name of a file"),
            _address_told(path, "http://127.0.0.1:1"),
        ):
            pass


def test_the_file_of_an_address_goes_with_its_own_server_alone(tmp_path):
    file = tmp_path / "address"
    with _address_told(file, "http://127.0.0.1:1"):
        with _address_told(file, "http://127.0.0.1:2"):
            assert file.read_text() == "http://127.0.0.1:2\n"
        assert not file.exists()
    with _address_told(file, "http://127.0.0.1:1"):
        file.write_text("http://127.0.0.1:2\n")
    assert file.read_text() == "http://127.0.0.1:2\n"


@pytest.mark.parametrize(
    ("listening", "asked"),
    [
        ("http://0.0.0.0:8080", "http://127.0.0.1:8080"),
        ("http://[::]:8080", "http://[::1]:8080"),
        ("http://10.0.0.7:8080", "http://10.0.0.7:8080"),
    ],
)
def test_who_listens_on_all_addresses_is_asked_by_loopback(listening, asked):
    assert on_this_machine(listening) == asked


def test_the_http_process_stays_light(fake_server, engine):
    fake_server.post(prompt="x", size="64x64", stream=True, partial_images=1)
    with open(f"/proc/{fake_server.pid}/maps") as maps:
        assert "torch" not in maps.read()


@pytest.fixture(scope="module")
def abandoned(tmp_path_factory):
    """A server whose engine has gone, and the port at which that may come back."""
    port = free_ports(["engine"])["engine"]
    flags = ["--engine-endpoints", f"tcp://127.0.0.1:{port}"]
    with serve(tmp_path_factory.mktemp("abandoned"), *flags, ready=False) as server:
        yield server, port


def is_ready(server) -> bool:
    return server.get("/ready").status_code == 200


def test_an_engine_elsewhere_may_go_and_come_back(abandoned):
    server, port = abandoned
    with FakeEngine(port=port) as first:
        wait_until(lambda: is_ready(server))
        first.hold.set()
        stream = server.client().images.generate(prompt="x", size="64x64", stream=True)
        wait_until(lambda: first.waiting == 1)  # headers are sent before it has the request
    # What was there fails, and so does what comes.
    with pytest.raises(openai.APIError, match="the engine has exited"):
        list(stream)
    assert not is_ready(server)
    assert server.get("/v1/queue").json()["estimated_wait_s"] is None
    refused = server.post(prompt="x", size="64x64")
    assert refused.status_code == 503
    assert refused.json()["error"]["code"] == "engine_unavailable"
    with FakeEngine(port=port):
        wait_until(lambda: is_ready(server))
        assert server.post(prompt="x", size="64x64").status_code == 200


@pytest.mark.slow
def test_engines_that_come_and_go_leave_no_files_open(abandoned):
    server, port = abandoned
    counts = []
    for _ in range(12):
        with FakeEngine(port=port):
            wait_until(lambda: is_ready(server))
            assert server.post(prompt="x", size="64x64").status_code == 200
            counts.append(len(os.listdir(f"/proc/{server.pid}/fd")))
        wait_until(lambda: not is_ready(server))
    assert max(counts[6:]) <= max(counts[:3]) + 2, counts


def test_an_engine_elsewhere_may_die_before_its_first_word(tmp_path):
    with zmq.Context() as context:
        router = context.socket(zmq.ROUTER)
        router.linger = 0
        port = router.bind_to_random_port("tcp://127.0.0.1")
        endpoint = f"tcp://127.0.0.1:{port}"
        with serve(tmp_path, "--engine-endpoints", endpoint, ready=False) as server:
            assert router.poll(PATIENCE_S * 1e3)
            router.recv_multipart()
            context.destroy(0)  # waits until the port is free again
            with FakeEngine(port=port):
                wait_until(lambda: is_ready(server))


def test_an_engine_elsewhere_that_is_silent_is_not_ready(tmp_path):
    """Listening, and never a word; and no word is waited for in the end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"tcp://127.0.0.1:{silent.getsockname()[1]}"
        flags = ["--engine-endpoints", endpoint, "--drain-timeout-s", "100000"]
        with serve(tmp_path, *flags, ready=False) as server:
            assert server.get("/health").status_code == 200
            assert server.get("/ready").status_code == 503
            server.process.send_signal(signal.SIGTERM)
            assert server.process.wait() == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_server_at_once(shared_engine, engine, tmp_path, number):
    flags = ["--engine-endpoints", engine.endpoint, "--drain-timeout-s", "100000"]
    with serve(tmp_path, *flags) as server:
        engine.hold.set()
        stream = server.client().images.generate(prompt="x", size="64x64", stream=True)
        server.process.send_signal(number)
        wait_until(server.refuses_connections)
        assert not server.process.ended
        server.process.send_signal(number)
        assert server.process.wait() == 0
        assert "Traceback" not in server.log
        with pytest.raises(openai.APIError, match="shut down"):
            list(stream)
        engine.hold.clear()


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", 1), ("127.0.0.1", 0)])
def test_urls_that_may_lead_nowhere_are_told_once_at_the_start(host, warned, caplog):
    """Not by a server that listens on all addresses, which a test may not."""
    settings = load_settings(["--host", host, "--allow-anonymous"])
    engine = SimpleNamespace(model=None, num_ready=0)
    services = SimpleNamespace(settings=settings, engine=engine)

    async def started() -> None:
        saying = asyncio.create_task(_say_when_ready(f"http://{host}:1", services))
        await asyncio.sleep(0)
        saying.cancel()
        await asyncio.gather(saying, return_exceptions=True)

    asyncio.run(started())
    found = [record for record in caplog.records if "public_url" in record.getMessage()]
    assert [record.levelname for record in found] == ["WARNING"] * warned
