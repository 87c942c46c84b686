"""The adapters that requests name, in the scheduler's loop, which waits for none of them."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass

from krea2_srt.errors import (
    AdapterError,
    DeadlineError,
    DrainingError,
    Krea2Error,
    UnknownAdapterError,
    foreign,
)
from krea2_srt.lora.library import AdapterLibrary, AwaitedAdapters
from krea2_srt.messages import GetAdapters, LoadAdapter, SetAdapterNames, UnloadAdapter
from krea2_srt.request import AdapterChoice
from krea2_srt.sglang.exchange import Exchange

logger = logging.getLogger(__name__)

NO_FOLDER = "this server has no adapters: it was started without --lora-dir (KREA2_SRT_LORA_DIR)"

AdapterCommand = GetAdapters | LoadAdapter | UnloadAdapter | SetAdapterNames

Reply = Callable[[object, Krea2Error | None], None]
"""What a command has come to: its output, or why there is none."""


@dataclass(frozen=True, eq=False)
class _Awaited:
    """Something that waits for files.

    Attributes:
        done: whether they are there.
        then: called once, in the loop, when they are.
        fail: called once in its place, with the reason.
        exchange: of the request that waits; None of a command.
        due: clock time in seconds after which nobody waits any more; None is never.
    """

    done: Callable[[], bool]
    then: Callable[[], None]
    fail: Callable[[Krea2Error], None]
    exchange: Exchange | None = None
    due: float | None = None


class ServedAdapters:
    """Requests and commands that wait for adapters to be read.

    Args:
        library: serves them; None where there is no folder.
    """

    def __init__(self, library: AdapterLibrary | None) -> None:
        self.library = library
        self._awaited: list[_Awaited] = []

    @property
    def waiting(self) -> bool:
        """Whether anything waits, so that `poll` has to be called."""
        return bool(self._awaited)

    @property
    def exchanges(self) -> list[Exchange]:
        """The requests that wait."""
        return [one.exchange for one in self._awaited if one.exchange is not None]

    def poll(self) -> None:
        """Go on with all whose adapters are there, and fail those whose time is over."""
        if not self._awaited:
            return
        if self.library is not None:
            self.library.collect()
        now = time.monotonic()
        ready = [one for one in self._awaited if one.done()]
        late = [o for o in self._awaited if o not in ready and o.due is not None and now > o.due]
        self._awaited = [one for one in self._awaited if one not in ready and one not in late]
        for one in ready:
            _guarded(one)
        for one in late:
            one.fail(DeadlineError("deadline exceeded while an adapter was read"))

    def refuse(self) -> None:
        """Nothing is waited for any more: the server ends."""
        awaited, self._awaited = self._awaited, []
        for one in awaited:
            one.fail(DrainingError("the engine is shutting down"))

    def ask(self, exchange: Exchange, then: Callable[[AwaitedAdapters], None]) -> None:
        """Call ``then`` once a request's adapters were read; now where they are there.

        Raises:
            UnknownAdapterError: there are none here.
        """
        if self.library is None:
            raise UnknownAdapterError(min(choice.name for choice in exchange.adapters))
        self.library.collect()
        awaited = self.library.ask(exchange.adapters)
        limit_s = exchange.deadline_s
        due = None if limit_s is None else time.monotonic() + limit_s
        self.wait_for(lambda: awaited.done, lambda: then(awaited), exchange.failed, exchange, due)

    def wait_for(
        self,
        done: Callable[[], bool],
        then: Callable[[], None],
        fail: Callable[[Krea2Error], None],
        exchange: Exchange | None = None,
        due: float | None = None,
    ) -> None:
        """Call ``then`` once ``done`` says so, or ``fail``."""
        awaited = _Awaited(done, then, fail, exchange, due)
        if done():
            _guarded(awaited)
        else:
            self._awaited.append(awaited)

    def forget(self, exchange: Exchange) -> None:
        """A request is not waited for any more."""
        self._awaited = [one for one in self._awaited if one.exchange is not exchange]

    def command(self, command: AdapterCommand, reply: Reply) -> None:
        """Do what a client commands, and reply, now or when files have been read."""
        try:
            if self.library is None:
                if isinstance(command, LoadAdapter | UnloadAdapter):
                    raise AdapterError(NO_FOLDER)
                reply((), None)
                return
            self._command(self.library, command, reply)
        except Krea2Error as error:
            reply(None, error)

    def statistics(self) -> dict[str, tuple[str, int]]:
        """See `AdapterLibrary.statistics`."""
        return {} if self.library is None else self.library.statistics()

    def close(self) -> None:
        """End the threads."""
        if self.library is not None:
            self.library.close()

    def _command(self, library: AdapterLibrary, command: AdapterCommand, reply: Reply) -> None:
        def answer(work: Callable[[], object]) -> Callable[[], None]:
            def then() -> None:
                try:
                    output = work()
                except Exception as error:
                    reply(None, foreign(error))
                else:
                    reply(output, None)

            return then

        def fail(error: Krea2Error) -> None:
            reply(None, error)

        match command:
            case GetAdapters():
                listing = library.listing()
                self.wait_for(listing.done, answer(lambda: library.infos(listing)), fail)
            case LoadAdapter(name, path):
                read = library.read(name, path)

                def serve() -> object:
                    library.collect()
                    return library.serve(name, path, read)

                self.wait_for(lambda: read.done, answer(serve), fail)
            case UnloadAdapter(name):
                asked = library.ask([AdapterChoice(name)])

                def unload() -> None:
                    library.collect()
                    if not asked.is_there(name):
                        raise UnknownAdapterError(name)
                    library.unload(name)

                self.wait_for(lambda: asked.done, answer(unload), fail)
            case SetAdapterNames():
                library.set_names(command)
                reply(None, None)


def _guarded(awaited: _Awaited) -> None:
    """Whatever has come of files, the loop goes on and somebody is answered."""
    try:
        awaited.then()
    except Exception as error:
        logger.exception("krea2-srt: adapters that were read")
        awaited.fail(foreign(error))
