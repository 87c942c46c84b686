"""Who waits for a file: until it is there, its time is over, or the server ends; never for ever."""

from concurrent.futures import Future
from types import SimpleNamespace

import pytest

from krea2_srt.errors import DeadlineError, DrainingError, ModelError, UnknownAdapterError
from krea2_srt.messages import GetAdapters, LoadAdapter, SetAdapterNames
from krea2_srt.request import AdapterChoice
from krea2_srt.sglang.served_adapters import ServedAdapters


class Exchange(SimpleNamespace):
    """A request's, which keeps what it was failed with."""

    def __init__(self, deadline_s: float | None = None) -> None:
        choices = frozenset({AdapterChoice("a")})
        super().__init__(adapters=choices, deadline_s=deadline_s, errors=[])

    def failed(self, error: Exception) -> None:
        self.errors.append(error)


class Library:
    """Reads when the test says so."""

    def __init__(self) -> None:
        self.look: Future[object] = Future()

    def collect(self) -> None:
        pass

    def listing(self) -> "Future[object]":
        return self.look

    def infos(self, listing: "Future[object]") -> object:
        return listing.result()


@pytest.fixture
def served() -> ServedAdapters:
    return ServedAdapters(Library())


def wait(served: ServedAdapters, exchange: Exchange, due: float | None = None) -> list[str]:
    """What comes of a request that waits for the library's look."""
    entered: list[str] = []
    look = served.library.look
    served.wait_for(look.done, lambda: entered.append("in"), exchange.failed, exchange, due)
    return entered


def test_a_request_goes_on_once_its_file_was_read(served):
    exchange = Exchange()
    entered = wait(served, exchange)
    served.poll()
    assert (entered, served.waiting, served.exchanges) == ([], True, [exchange])
    served.library.look.set_result(None)
    served.poll()
    served.poll()
    assert (entered, served.waiting, exchange.errors) == (["in"], False, [])


def test_its_deadline_is_kept_while_nothing_is_read(served):
    exchange = Exchange()
    entered = wait(served, exchange, due=0.0)
    served.poll()
    assert [type(error) for error in exchange.errors] == [DeadlineError]
    assert (entered, served.waiting) == ([], False)


def test_a_server_that_ends_waits_for_no_file(served):
    exchange, replies = Exchange(), []
    wait(served, exchange)
    served.command(GetAdapters(), lambda output, error: replies.append(error))
    served.refuse()
    assert [type(error) for error in (*exchange.errors, *replies)] == [DrainingError] * 2
    assert not served.waiting


def test_whatever_a_thread_raises_is_an_answer_and_the_loop_goes_on(served):
    replies: list[object] = []
    served.command(GetAdapters(), lambda output, error: replies.append(error))
    served.library.look.set_exception(ZeroDivisionError("secret"))
    served.poll()
    assert [str(error) for error in replies] == ["the model failed: ZeroDivisionError"]
    exchange = Exchange()

    def fails() -> None:
        raise KeyError("secret")

    served.wait_for(lambda: True, fails, exchange.failed, exchange)
    assert [type(error) for error in exchange.errors] == [ModelError]


def test_without_a_folder_there_are_none(served):
    served = ServedAdapters(None)
    with pytest.raises(UnknownAdapterError):
        served.ask(Exchange(), lambda awaited: None)
    replies: list[object] = []
    for command in (GetAdapters(), SetAdapterNames(), LoadAdapter("a")):
        served.command(command, lambda output, error: replies.append((output, error)))
    assert replies[:2] == [((), None)] * 2
    assert "was started without --lora-dir" in str(replies[2][1])
