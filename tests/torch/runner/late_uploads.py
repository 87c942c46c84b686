"""Uploads on a CPU, which are done as late, or as early, as events allow."""

import random
from collections import deque
from dataclasses import dataclass

from torch import Tensor

from krea2_srt.runner.upload_stream import Moment

SPOILT = 0xFF
"""In all bytes of what is being overwritten: NaN in bfloat16, float32 and e4m3."""


@dataclass(eq=False)
class Upload:
    """One that is queued."""

    target: Tensor
    source: Tensor
    uploads: "LateUploads"

    def synchronize(self) -> None:
        self.uploads.wait(self)


class Now:
    """A moment that has passed: on a CPU nothing runs later than it is told to."""

    def synchronize(self) -> None:
        pass


class LateUploads:
    """`krea2_srt.runner.upload_stream.UploadStream` at random speed.

    What is overwritten is spoilt at once, so whoever reads a buffer after its next upload was
    queued, or before its own is waited for, reads nonsense.

    Args:
        random_: decides which uploads are done when nobody waits.
    """

    def __init__(self, random_: random.Random) -> None:
        self._random = random_
        self._queued: deque[Upload] = deque()
        self.waited = 0

    def upload(self, target: Tensor, source: Tensor, after: Moment | None) -> Moment:
        self._go_on()
        target.fill_(SPOILT)
        self._queued.append(Upload(target, source, self))
        return self._queued[-1]

    def mark(self) -> Moment:
        self._go_on()
        return Now()

    def wait(self, moment: Moment) -> None:
        self._go_on()
        self.waited += moment in self._queued
        while moment in self._queued:
            self._do_one()

    def _go_on(self) -> None:
        while self._queued and self._random.random() < 0.3:
            self._do_one()

    def _do_one(self) -> None:
        upload = self._queued.popleft()
        upload.target.copy_(upload.source)
