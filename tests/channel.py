"""A client of the scheduler's channel that sees everything, in the order in which it comes."""

import pickle
import re
import time

import psutil
import zmq

PATIENCE_S = 300.0
"""A wait this long is in vain, however busy the machine is."""


def endpoints(log: str) -> list[str]:
    """Where the replicas of a server listen, by its log."""
    return re.findall(r"Scheduler \(dp replica \d+\) bind at endpoint: (\S+)", log)


class Channel:
    """One DEALER socket."""

    def __init__(self, endpoint: str) -> None:
        self._socket = zmq.Context.instance().socket(zmq.DEALER)
        self._socket.linger = 0
        self._socket.connect(endpoint)

    def send(self, message: object) -> None:
        # SGLang's client sends a request as a list of one.
        self._socket.send_multipart([b"", pickle.dumps(message)])

    def receive(self, timeout_s: float = PATIENCE_S):
        if not self._socket.poll(timeout_s * 1e3):
            raise TimeoutError("no answer")
        return pickle.loads(self._socket.recv_multipart()[-1])

    def ask(self, message: object, timeout_s: float = PATIENCE_S):
        self.send(message)
        return self.receive(timeout_s)

    def close(self) -> None:
        self._socket.close()

    def __enter__(self) -> "Channel":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def statistics(endpoint: str, timeout_s: float = PATIENCE_S) -> dict:
    """What the engine says of itself."""
    from krea2_srt.messages import GetStatistics

    with Channel(endpoint) as channel:
        return channel.ask(GetStatistics(), timeout_s).output


def wait_until(condition, timeout_s: float = PATIENCE_S, poll_s: float = 0.02):
    """Ask until an answer is true; returns it."""
    deadline = time.monotonic() + timeout_s
    while not (answer := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(poll_s)
    return answer


SGLANGS_MASTER_PORTS = set(range(30005, 32768, 37))
"""Where SGLang looks for a free one, below those that the system gives out."""


def listens_where_sglang_looks(pid: int) -> bool:
    """Whether a process has a port that another one, started with it, would have chosen too."""
    connections = psutil.Process(pid).net_connections("tcp")
    ports = {it.laddr.port for it in connections if it.status == psutil.CONN_LISTEN}
    return bool(ports & SGLANGS_MASTER_PORTS)
