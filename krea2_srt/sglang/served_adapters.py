"""The adapters that requests name, in the scheduler's loop, which waits for none of them."""

from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from krea2_srt.errors import AdapterError, Krea2Error, UnknownAdapterError
from krea2_srt.lora.library import AdapterLibrary, AwaitedAdapters
from krea2_srt.messages import AdapterInfo, GetAdapters, LoadAdapter, UnloadAdapter
from krea2_srt.sglang.exchange import Exchange

NO_FOLDER = "this server has no adapters: it was started without --lora-dir (KREA2_SRT_LORA_DIR)"

Then = Callable[[AwaitedAdapters], None]
Reply = Callable[[object, Krea2Error | None], None]
"""What a command has come to: its output, or why there is none."""


@dataclass(frozen=True, eq=False)
class _Awaited:
    """Something that waits for files.

    Attributes:
        done: whether they are there.
        then: called once, in the loop.
        exchange: of the request that waits; None of a command.
    """

    done: Callable[[], bool]
    then: Callable[[], None]
    exchange: Exchange | None = None


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
        """Go on with all whose adapters are there."""
        if self.library is not None:
            self.library.collect()
        ready = [one for one in self._awaited if one.done()]
        self._awaited = [one for one in self._awaited if one not in ready]
        for one in ready:
            one.then()

    def ask(self, exchange: Exchange, then: Then) -> None:
        """Call ``then`` once a request's adapters were read; now where they are there.

        Raises:
            UnknownAdapterError: there are none here.
        """
        if self.library is None:
            raise UnknownAdapterError(min(choice.name for choice in exchange.adapters))
        self.library.collect()
        awaited = self.library.ask(exchange.adapters)
        self.wait_for(lambda: awaited.done, lambda: then(awaited), exchange)

    def wait_for(
        self, done: Callable[[], bool], then: Callable[[], None], exchange: Exchange | None = None
    ) -> None:
        """Call ``then``, which raises nothing, once ``done`` says so."""
        if done():
            then()
        else:
            self._awaited.append(_Awaited(done, then, exchange))

    def forget(self, exchange: Exchange) -> None:
        """A request is not waited for any more."""
        self._awaited = [one for one in self._awaited if one.exchange is not exchange]

    def command(self, command: GetAdapters | LoadAdapter | UnloadAdapter, reply: Reply) -> None:
        """Do what a client commands, and reply, now or when files have been read."""
        library = self.library
        try:
            if library is None:
                if not isinstance(command, GetAdapters):
                    raise AdapterError(NO_FOLDER)
                reply((), None)
                return
            match command:
                case GetAdapters():
                    listing = library.listing()
                    self.wait_for(listing.done, lambda: _answer(reply, _infos(library, listing)))
                case LoadAdapter(name, path):
                    awaited = library.read(name, path)
                    self.wait_for(
                        lambda: awaited.done,
                        lambda: _answer(reply, _loaded(library, command, awaited)),
                    )
                case UnloadAdapter(name):
                    library.unload(name)
                    reply(None, None)
        except Krea2Error as error:
            reply(None, error)

    def statistics(self) -> dict[str, tuple[str, int]]:
        """See `AdapterLibrary.statistics`."""
        return {} if self.library is None else self.library.statistics()

    def close(self) -> None:
        """End the threads."""
        if self.library is not None:
            self.library.close()


def _answer(reply: Reply, work: Callable[[], object]) -> None:
    try:
        output = work()
    except Krea2Error as error:
        reply(None, error)
    else:
        reply(output, None)


def _infos(
    library: AdapterLibrary, listing: "Future[list[AdapterInfo]]"
) -> Callable[[], tuple[AdapterInfo, ...]]:
    return lambda: library.infos(listing)


def _loaded(
    library: AdapterLibrary, command: LoadAdapter, awaited: AwaitedAdapters
) -> Callable[[], AdapterInfo]:
    def work() -> AdapterInfo:
        library.collect()
        awaited.result()
        return library.serve(command.name, command.path)

    return work
