"""Where exchanges are played: a server with its settings, and an engine that does as told."""

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO
from urllib.parse import urlsplit

from tests import channel
from tests.server.moderation.address import Address, inputs, moderations_address, result
from tests.server.recorded.connection import Answer, Connection
from tests.server.recorded.exchange import HOST, LAST_URL, Exchange
from tests.server.recorded.normalise import Normaliser, describe
from tests.server.recorded.told_engine import ToldEngine
from tests.server.serving import Served, serve

# There are hundreds of exchanges, most of which have ended within some milliseconds.
wait_until = partial(channel.wait_until, poll_s=0.001)


@dataclass(frozen=True)
class Setting:
    """A server of the recording.

    Attributes:
        flags: of krea2-serve.
        files: in its folder, by name; ``{moderations}`` is the address that checks content.
        engine: whether there is one from the start.
    """

    flags: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    engine: bool = True


@contextlib.contextmanager
def stage(setting: Setting, folder: Path) -> Iterator["Stage"]:
    """A running one.

    Args:
        folder: for the server's files.
    """
    with contextlib.ExitStack() as stack:
        address = stack.enter_context(moderations_address())
        engine = ToldEngine()
        stack.callback(engine.stop)
        engine.start()
        if not setting.engine:
            engine.stop()
        folder.mkdir(parents=True)
        for name, text in setting.files.items():
            (folder / name).write_text(text.replace("{moderations}", address.url))
        flags = ("--engine-endpoints", engine.endpoint, "--log-format", "json", *setting.flags)
        server = stack.enter_context(serve(folder, *flags, ready=setting.engine))
        log = stack.enter_context(server.process.log_file.open(encoding="utf-8"))
        playing = Stage(server, engine, address, log)
        yield playing
        playing.end()


class Stage:
    """Plays exchanges, one after the other.

    Args:
        server, engine: the two ends.
        address: checks content, where the server's policy says so.
        log: the server's.
    """

    def __init__(self, server: Served, engine: ToldEngine, address: Address, log: TextIO) -> None:
        self.server = server
        self._engine = engine
        self._address = address
        address.respond = self._check
        self._refuses_images = self._checks_fail = False
        self._last_url = ""
        self._drained = False
        self._counted: dict[str, int] = {}
        self._log = log

    def play(self, exchange: Exchange) -> dict[str, Any]:
        """What comes of an exchange, as it is recorded."""
        self.tell(exchange)
        beside = [self._held(other) for other in exchange.beside]
        if exchange.before is not None:
            exchange.before(self)
        connection = self._connect(exchange)
        if exchange.meanwhile is not None:
            if "expect" in exchange.headers:
                connection.wait_for_continue()
            else:
                wait_until(lambda: self._engine.waiting == len(beside) + 1)
            exchange.meanwhile(self)
            if "expect" in exchange.headers:
                connection.send(exchange.body or b"")
        answer = self._answer(exchange, connection)
        if exchange.releases:
            self._engine.hold.clear()
        answers = [other.answer() for other in beside]
        values = self._recorded(exchange, answer, answers)
        if exchange.may_count:
            before, self._counted = self._counted, self._counts()
            changes = {name: n - before.get(name, 0) for name, n in self._counted.items()}
            if any(changes.values()):
                values["counted"] = {name: n for name, n in changes.items() if n}
        return values

    def tell(self, exchange: Exchange) -> None:
        """Tell the engine, and who checks content, what an exchange needs."""
        told = dict(exchange.engine)
        self._refuses_images = bool(told.pop("images_are_refused", False))
        self._checks_fail = bool(told.pop("checks_fail", False))
        if not told.pop("away", False) and not self._engine.running:
            self._engine.start()
            wait_until(lambda: self.server.get("/ready").status_code == 200)
        if exchange.meanwhile or exchange.beside:
            told["hold"] = True
        self._engine.tell(told)

    def end(self) -> None:
        """Wait for a server that was told to end: told again, it would end at once."""
        if self._drained:
            self.server.process.wait()

    def stop_engine(self) -> None:
        """It exits with whatever it has."""
        self._engine.stop()

    def drain(self) -> None:
        """Tell the server to end, and wait until it has begun to."""
        self._drained = True
        self.server.process.terminate()
        wait_until(self.server.refuses_connections)

    def wait_for_queue(self, waiting: int) -> None:
        """Wait until the server knows how many requests wait in the engine, and that none runs."""

        def known() -> bool:
            counts = (("waiting", waiting), ("running", 0))
            return all(
                [*self._metrics(f"krea2_engine_{state}_requests").values()] == [count]
                for state, count in counts
            )

        wait_until(known)

    def _held(self, exchange: Exchange) -> Connection:
        before = self._engine.waiting
        connection = self._connect(exchange)
        wait_until(lambda: self._engine.waiting == before + 1)
        return connection

    def _connect(self, exchange: Exchange) -> Connection:
        if exchange.raw is not None:
            return Connection(self.server.port, exchange.raw)
        path = exchange.path.replace(LAST_URL, self._last_url)
        headers = {"host": HOST, **exchange.headers}
        if exchange.body is not None:
            headers.setdefault("content-length", str(len(exchange.body)))
        lines = [f"{name}: {value}\r\n" for name, value in headers.items()]
        head = f"{exchange.method} {path} HTTP/1.1\r\n{''.join(lines)}\r\n"
        body = b"" if "expect" in headers else exchange.body or b""
        return Connection(self.server.port, head.encode("latin-1") + body)

    def _answer(self, exchange: Exchange, connection: Connection) -> Answer:
        if exchange.until is not None:
            connection.read_until(*exchange.until)
        if exchange.hangs_up:
            return self._hang_up(exchange, connection)
        if exchange.until is not None:
            self._engine.hold.clear()
        return connection.answer(to_head=exchange.method == "HEAD")

    def _hang_up(self, exchange: Exchange, connection: Connection) -> Answer:
        if exchange.raw is not None:  # a part of a request, which reaches no engine
            connection.close()
            return Answer((), (), False)
        wait_until(lambda: self._engine.waiting == 1)
        answer = connection.so_far(*exchange.until or ("", 0))
        connection.close()
        wait_until(lambda: self._engine.cancelled)
        return answer

    def _recorded(self, exchange: Exchange, answer: Answer, beside: list[Answer]) -> dict[str, Any]:
        log = self._new_log_lines(exchange)
        requests, cancelled = list(self._engine.requests), list(self._engine.cancelled)
        own_id = answer.header("x-request-id")
        if exchange.hangs_up and requests:
            own_id = own_id or requests[-1].request_id
            assert cancelled == [own_id]
        seed = requests[-1].image.seed if requests and not exchange.has_seed else None
        file_name = self._last_url.partition("?")[0].rpartition("/")[2].partition(".")[0]
        normal = Normaliser(exchange, own_id, seed, file_name)
        values: dict[str, Any] = {"name": exchange.name, "request": describe(exchange)}
        values |= normal.answer(answer)
        for key, found in (
            ("engine", [normal.message(message) for message in requests]),
            ("cancelled", ["<id>" if one == own_id else one for one in cancelled]),
            ("beside", [self._beside(*both) for both in zip(exchange.beside, beside, strict=True)]),
            ("log", sorted(map(normal.log_line, log), key=_own_last)),
        ):
            if found:
                values[key] = found
        self._keep_url(exchange, answer)
        return values

    def _keep_url(self, exchange: Exchange, answer: Answer) -> None:
        if exchange.fields.get("response_format") == "url" and answer.header("content-length"):
            for image in json.loads(answer.whole).get("data", []):
                url = urlsplit(image["url"])
                self._last_url = f"{url.path}?{url.query}"

    def _beside(self, exchange: Exchange, answer: Answer) -> dict[str, Any]:
        normal = Normaliser(exchange, answer.header("x-request-id"), None)
        return {"request": describe(exchange), **normal.answer(answer)}

    def _new_log_lines(self, exchange: Exchange) -> list[dict[str, Any]]:
        """The lines of this exchange's requests, when all of them have ended."""
        count = exchange.logged + len(exchange.beside)
        lines: list[dict[str, Any]] = []
        partial = ""

        def all_there() -> bool:
            nonlocal partial
            *whole, partial = (partial + self._log.read()).split("\n")
            found = [json.loads(line) for line in whole if line.startswith("{")]
            lines.extend(line for line in found if "request_id" in line)
            return sum(line["logger"] == "krea2_server.access" for line in lines) >= count

        wait_until(lambda: all_there() and not partial)
        return lines

    def _counts(self) -> dict[str, int]:
        """How requests have ended."""
        found = self._metrics("krea2_requests_total")
        return {labels.split('"')[1]: int(value) for labels, value in found.items()}

    def _metrics(self, name: str) -> dict[str, float]:
        """A metric's values by its labels."""
        request = f"GET /metrics HTTP/1.1\r\nhost: {HOST}\r\n\r\n".encode()
        text = Connection(self.server.port, request).answer().whole.decode()
        lines = [line for line in text.splitlines() if line.startswith(name + "{")]
        return {key: float(value) for key, _, value in (line.rpartition(" ") for line in lines)}

    def _check(self, request: dict[str, Any]) -> tuple[int, object]:
        """A moderation's answer: prompts with "forbidden" are violent, images where told."""
        if self._checks_fail:
            return 500, {}
        scores = []
        for given in inputs(request):
            violent = "forbidden" in given if isinstance(given, str) else self._refuses_images
            scores.append({"violence": 0.9 * violent})
        return 200, {"results": [result(each) for each in scores]}


def _own_last(line: str) -> tuple[bool, str]:
    """Requests that end together have their lines in any order."""
    own = "<another id>" not in line
    return own, "" if own else line
