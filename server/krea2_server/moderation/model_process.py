"""The process of the models, as the HTTP process sees it."""

import asyncio
import contextlib
import itertools
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from krea2_server.moderation import messages
from krea2_server.moderation.checkers import CheckerError
from krea2_server.moderation.messages import Check, Drop, Failed, Load, Loaded, ModelSpec, NotLoaded
from krea2_srt.threads import wait_variables

logger = logging.getLogger(__name__)

_LONGEST_PAUSE_S = 60.0


class ModelLoadError(Exception):
    """A model cannot be loaded.

    Args:
        answer: which, and why.
    """

    def __init__(self, answer: NotLoaded) -> None:
        super().__init__(answer.reason)
        self.answer = answer


class ModelProcess:
    """Runs all models in one child process, and starts it anew when it dies.

    Args:
        models: to load.
        hang_s: for a check to end after nobody waits for it any more. The longest single forward
            must fit; a process that takes longer is hung, and killed.
    """

    def __init__(self, models: Sequence[ModelSpec], *, hang_s: float = 60.0) -> None:
        self._models = tuple(models)
        self._hang_s = hang_s
        self._process: asyncio.subprocess.Process | None = None
        self._ready = asyncio.Event()
        self._asked: dict[int, asyncio.Future[dict[str, float]]] = {}
        """By check, also those that nobody waits for, until they are answered."""
        self._check_ids = itertools.count()
        self._keeper: asyncio.Task[None] | None = None

    async def start(self) -> tuple[tuple[str, ...], ...]:
        """Load the models.

        Returns:
            The labels of each.

        Raises:
            ModelLoadError: one cannot be loaded.
            CheckerError: the process has died of it.
        """
        try:
            labels = await self._open()
        except BaseException:
            await self._kill()
            raise
        self._keeper = asyncio.create_task(self._keep())
        return labels

    async def close(self) -> None:
        """End the process, and with it all that is asked of it."""
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.gather(self._keeper, return_exceptions=True)
            self._keeper = None
        await self._kill()
        self._fail_all("it is shut down")

    async def scores(self, model: int, contents: Sequence[str | bytes]) -> dict[str, float]:
        """What a model says of texts or of images as files: the highest score of each label.

        Args:
            model: index among the models.

        Raises:
            CheckerError: it has failed, or its process has died.
        """
        if self._keeper is None:
            raise CheckerError("it is not started")
        await self._ready.wait()
        check_id = next(self._check_ids)
        future = asyncio.get_running_loop().create_future()
        self._asked[check_id] = future
        try:
            self._send(Check(check_id, model, tuple(contents)))
            found: dict[str, float] = await future
            return found
        except asyncio.CancelledError:
            self._drop(check_id)
            raise

    async def _open(self) -> tuple[tuple[str, ...], ...]:
        # A command of its own, not multiprocessing's: that leaves a second process behind, and
        # imports the whole server again.
        self._process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "krea2_server.moderation.worker",
            env={**os.environ, **wait_variables(os.environ)},
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
        )
        self._send(Load(self._models))
        match await self._receive():
            case Loaded(labels):
                self._ready.set()
                return labels
            case NotLoaded() as answer:
                raise ModelLoadError(answer)
            case _:
                raise CheckerError(f"its process has died{await self._kill()}")

    async def _keep(self) -> None:
        """Hand out answers; when there are no more, start the process again."""
        while True:
            while (answer := await self._receive()) is not None:
                self._answered(answer)
            end = await self._kill()
            logger.error("the process of the moderation's models has died%s; starting it", end)
            self._fail_all("its process has died")
            await self._reopen()

    async def _reopen(self) -> None:
        for pause_s in _pauses():
            try:
                await self._open()
            except (CheckerError, ModelLoadError, OSError) as error:
                await self._kill()
                logger.error(
                    "the moderation's models cannot be loaded, trying again in %g s: %s",
                    pause_s,
                    error,
                )
                await asyncio.sleep(pause_s)
            else:
                logger.info("the moderation's models are loaded again")
                return

    def _answered(self, answer: messages.Scores | Failed) -> None:
        future = self._asked.pop(answer.check_id)
        if future.done():
            return
        if isinstance(answer, Failed):
            future.set_exception(CheckerError(answer.reason))
        else:
            future.set_result(answer.scores)

    def _drop(self, check_id: int) -> None:
        if check_id in self._asked and self._ready.is_set():
            self._send(Drop(check_id))
            asyncio.get_running_loop().call_later(self._hang_s, self._kill_if_hung, check_id)

    def _kill_if_hung(self, check_id: int) -> None:
        if check_id in self._asked and self._process is not None:
            logger.error("the process of the moderation's models hangs; killing it")
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()

    def _fail_all(self, reason: str) -> None:
        for future in self._asked.values():
            if not future.done():
                future.set_exception(CheckerError(reason))
        self._asked.clear()

    def _send(self, message: Any) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        # Where its end has not been noticed yet, reading from it will; uvloop's error is a
        # RuntimeError.
        with contextlib.suppress(OSError, RuntimeError):
            self._process.stdin.write(messages.encode(message))

    async def _receive(self) -> Any:
        """The next answer; None when there will be no more."""
        assert self._process is not None
        assert self._process.stdout is not None
        stream = self._process.stdout
        try:
            header = await stream.readexactly(messages.HEADER_BYTES)
            return messages.decode(await stream.readexactly(messages.body_bytes(header)))
        except asyncio.IncompleteReadError:
            return None

    async def _kill(self) -> str:
        """End the process, if it has not ended; how it did, for a message."""
        if self._process is None:
            return ""
        self._ready.clear()
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()
        code = await self._process.wait()
        self._process = None
        return f" (exit code {code})"


def _pauses() -> Iterator[float]:
    """Between attempts to load the models again."""
    pause_s = 1.0
    while True:
        yield pause_s
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
