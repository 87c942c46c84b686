"""How answers get from the scheduler process to its clients."""

import pickle
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any

from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker
from sglang.multimodal_gen.runtime.pipelines_core.schedule_batch import OutputBatch
from sglang.multimodal_gen.runtime.platforms import current_platform
from sglang.multimodal_gen.runtime.utils.logging_utils import init_logger

logger = init_logger(__name__)

THREADS = 4


class Replies:
    """Sends our messages and SGLang's outputs, and has the threads in which pictures are encoded.

    Args:
        worker: SGLang's.
        send: bytes to a client's socket, from any thread.
        return_result: SGLang's own way of answering: (identity, payload), output.
    """

    def __init__(
        self,
        worker: GPUWorker,
        send: Callable[[bytes, bytes], None],
        return_result: Callable[[tuple[bytes, Any], OutputBatch], None],
    ) -> None:
        self.worker = worker
        self._send = send
        self._return_result = return_result
        # A thread begins on GPU 0, whichever is ours.
        device = current_platform.get_device(worker.local_rank)
        use_device = partial(current_platform.set_device, device)
        self._pool = ThreadPoolExecutor(
            THREADS,
            "krea2-reply",
            initializer=None if current_platform.is_cpu() else use_device,
        )

    def send(self, identity: bytes, message: object) -> None:
        """One of our messages to a client."""
        self._send(identity, pickle.dumps(message))

    def reply(self, identity: bytes, payload: Any, output: OutputBatch) -> None:
        """SGLang's answer to what a client has sent; raises nothing that is the client's fault."""
        try:
            self._return_result((identity, payload), output)
        except Exception:
            logger.exception("krea2-srt: a reply failed")
            self.send(identity, OutputBatch(error=output.error or "the reply could not be sent"))

    def submit(self, work: Callable[[], None]) -> "Future[None]":
        """Encode, save and reply off the loop.

        Args:
            work: raises nothing.
        """
        return self._pool.submit(work)

    def finish(self) -> None:
        """Wait for all replies."""
        self._pool.shutdown(wait=True)
