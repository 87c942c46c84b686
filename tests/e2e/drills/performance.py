"""Performs drills: those that need no server of their own on one, one after the other."""

from contextlib import suppress
from pathlib import Path

from krea2_srt.testing.processes import ProcessError
from tests.e2e.drills.deployment import Deployment
from tests.e2e.drills.drill import Drill


class Drills:
    """Performs them until it is closed.

    Args:
        model: folder of a checkpoint.
        folder: for the files of each drill.
    """

    def __init__(self, model: Path, folder: Path) -> None:
        self._model = model
        self._folder = folder
        self._started = 0
        self._shared: Deployment | None = None

    def perform(self, drill: Drill) -> None:
        """Raises what the drill raises; the next one then gets a new server."""
        if drill.run_alone is not None:
            drill.run_alone(self._model, self._folder / drill.name)
            return
        assert drill.run is not None
        try:
            drill.run(self._running())
        except BaseException:
            # Nobody knows what it is still good for.
            with suppress(ProcessError):
                self.close()
            raise

    def _running(self) -> Deployment:
        if self._shared is not None and self._shared.ended:
            self.close()
        if self._shared is None:
            self._started += 1
            shared = Deployment(self._model, self._folder / f"shared-{self._started}")
            self._shared = shared.__enter__()
        return self._shared

    def close(self) -> None:
        """End the server that drills have shared."""
        shared, self._shared = self._shared, None
        if shared is not None:
            shared.__exit__(None, None, None)
