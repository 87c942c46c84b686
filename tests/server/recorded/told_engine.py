"""The fake engine, which can also be wrong, and be away."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from krea2_srt.messages import Accepted, Generated, GenerateRequest
from krea2_srt.testing.fake_engine import FakeEngine


@dataclass
class ToldEngine(FakeEngine):
    """An engine that starts and stops on one port.

    Attributes:
        loses_an_image: whether it answers with one image less than it was asked for.
        silent: whether it accepts nothing.
        running: whether it is there.
    """

    loses_an_image: bool = False
    silent: bool = False
    running: bool = False

    def start(self) -> None:
        """The first time on any free port."""
        self.__enter__()
        self.port = int(self.endpoint.rpartition(":")[2])
        self.running = True

    def stop(self) -> None:
        """It exits with whatever it has, if it is there."""
        if self.running:
            self.__exit__()
            self.running = False

    def tell(self, told: Mapping[str, object]) -> None:
        """How to behave from now on.

        Args:
            told: values of its attributes, ``hold`` and ``hold_at_preview``: whether nothing goes
                on, and whether nothing does after the first preview.
        """
        self.reset()
        self.loses_an_image = self.silent = False
        self.on_preview = lambda _: None
        for name, value in told.items():
            match name:
                case "hold":
                    self.hold.set()
                case "hold_at_preview":
                    self.on_preview = lambda _: self.hold.set()
                case _:
                    assert hasattr(self, name), name
                    setattr(self, name, value)

    def _sender(self, identity: bytes) -> Callable[[object], None]:
        send = super()._sender(identity)

        def unless_silent(message: object) -> None:
            if not (self.silent and isinstance(message, Accepted)):
                send(message)

        return unless_silent

    def _generated(self, message: GenerateRequest) -> Generated:
        generated = super()._generated(message)
        if self.loses_an_image:
            generated = dataclasses.replace(generated, images=generated.images[1:])
        return generated
