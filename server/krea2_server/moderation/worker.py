"""The models' process, `ModelProcess` starts it: ``python -m krea2_server.moderation.worker``.

Checks take turns, one forward each, so that a short prompt does not wait for all of a long one.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from itertools import chain
from queue import SimpleQueue
from typing import Any, BinaryIO

from krea2_server.moderation import classifiers, messages
from krea2_server.moderation.messages import Check, Drop, Failed, Load, Loaded, NotLoaded, Scores

_KINDS: dict[str, Callable[[str, str], classifiers.Classifier]] = {
    "text-classification": classifiers.TextClassifier,
    "image-classification": classifiers.ImageClassifier,
}


def main() -> None:
    # It ends with the pipe, when the HTTP process has no more use for it; whoever ends all
    # processes at once wants that one to finish what it has accepted.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    answers = os.fdopen(os.dup(1), "wb")
    # What libraries print must not get between the answers.
    os.dup2(2, 1)
    questions: SimpleQueue[Any] = SimpleQueue()
    threading.Thread(target=_listen, args=(sys.stdin.buffer, questions), daemon=True).start()
    try:
        loaded = _load(questions.get())
        if isinstance(loaded, NotLoaded):
            _send(answers, loaded)
            return
        _send(answers, Loaded(tuple(each.labels for each in loaded)))
        Turns(loaded, questions, answers).run()
    except BrokenPipeError:
        pass


class Turns:
    """All checks that are under way.

    Args:
        models: to check with.
        questions: `Check` and `Drop`.
        answers: where `Scores` and `Failed` are written.
    """

    def __init__(
        self,
        models: list[classifiers.Classifier],
        questions: "SimpleQueue[Any]",
        answers: BinaryIO,
    ) -> None:
        self._models = models
        self._questions = questions
        self._answers = answers
        self._under_way: dict[int, Iterator[dict[str, float]]] = {}
        """What is left of each check, in the order of their turns."""
        self._highest: dict[int, dict[str, float]] = {}

    def run(self) -> None:
        """Answer for ever."""
        while True:
            # With nothing to do, wait for something.
            while not self._under_way or not self._questions.empty():
                self._take(self._questions.get())
            self._turn()

    def _take(self, question: Check | Drop) -> None:
        if isinstance(question, Check):
            self._under_way[question.check_id] = self._pieces(question)
            self._highest[question.check_id] = {}
        elif question.check_id in self._under_way:
            self._end(Failed(question.check_id, "nobody waits for it"))

    def _turn(self) -> None:
        check_id, pieces = next(iter(self._under_way.items()))
        # Behind all others, for the next time.
        self._under_way[check_id] = self._under_way.pop(check_id)
        highest = self._highest[check_id]
        try:
            scores = chain(highest.items(), next(pieces).items())
            self._highest[check_id] = classifiers.highest(scores)
        except StopIteration:
            self._end(Scores(check_id, highest))
        except Exception as error:
            # Without its text, which may quote a prompt.
            self._end(Failed(check_id, type(error).__name__))

    def _end(self, answer: Scores | Failed) -> None:
        del self._under_way[answer.check_id], self._highest[answer.check_id]
        _send(self._answers, answer)

    def _pieces(self, check: Check) -> Iterator[dict[str, float]]:
        for content in check.contents:
            yield from self._models[check.model].scores(content)


def _load(question: Load) -> list[classifiers.Classifier] | NotLoaded:
    if question.models:
        _quiet_transformers()
    loaded: list[classifiers.Classifier] = []
    for index, spec in enumerate(question.models):
        try:
            classifier = _KINDS[spec.kind](spec.path, spec.device)
            for _ in classifier.scores(classifier.sample):
                pass
        except classifiers.UnusableDeviceError as error:
            return NotLoaded(index, "device", f"cannot be used: {error}")
        except classifiers.UnusableModelError as error:
            return NotLoaded(index, "model", str(error))
        except Exception as error:  # whatever transformers and torch make of strange files
            text = str(error).strip().partition("\n")[0]
            return NotLoaded(index, "model", f"cannot be used: {type(error).__name__}: {text}")
        loaded.append(classifier)
    return loaded


def _quiet_transformers() -> None:
    # Else it asks a service of the hub to convert repositories that have no safetensors.
    os.environ["DISABLE_SAFETENSORS_CONVERSION"] = "1"
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _listen(stream: BinaryIO, questions: "SimpleQueue[Any]") -> None:
    """Read questions, whatever is computed meanwhile, and end the process with the pipe."""
    try:
        while len(header := stream.read(messages.HEADER_BYTES)) == messages.HEADER_BYTES:
            length = messages.body_bytes(header)
            if len(body := stream.read(length)) < length:
                break
            questions.put(messages.decode(body))
    finally:
        os._exit(0)


def _send(answers: BinaryIO, message: Any) -> None:
    answers.write(messages.encode(message))
    answers.flush()


if __name__ == "__main__":
    main()
