"""Hugging Face classifiers. Only the models' process uses them: it alone imports torch."""

import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

MAX_WINDOW_TOKENS = 512
"""Tokens of a text that are read at once, special ones included; longer texts have windows."""

OVERLAP = 0.25
"""Share that two windows have in common: what lies across the end of one, up to this part of it, is
whole in the next.
"""


class UnusableModelError(Exception):
    """A model loads, but cannot be what the policy takes it for."""


class UnusableDeviceError(Exception):
    """A model cannot be moved to where it is to run."""


class Classifier(Protocol):
    """A loaded model.

    Attributes:
        labels: what it scores.
        sample: a content that takes all it can: who reads it, reads any.
    """

    labels: tuple[str, ...]

    @property
    def sample(self) -> Any: ...

    def scores(self, content: Any) -> Iterator[dict[str, float]]:
        """Each label's score in each piece of a content, one forward after the other."""


class TextClassifier:
    """A model for sequence classification.

    Args:
        path: folder or repo id.
        device: torch's name of it.

    Raises:
        UnusableModelError: it lacks what checking takes.
        UnusableDeviceError: there is no such device, or no room there.
        Exception: transformers' own, of all kinds, where the files are not what they should be.
    """

    def __init__(self, path: str, device: str) -> None:
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not tokenizer.is_fast:
            raise UnusableModelError("has no tokenizer.json, which windows take")
        self._inputs = frozenset(tokenizer.model_input_names)
        self._tokenizer = tokenizer.backend_tokenizer
        # Its file may ask for either; windows are cut here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._network = _Network(AutoModelForSequenceClassification, path, device)
        self.labels = self._network.labels
        # Tokenizers without a limit of their own have an astronomic one.
        self.window: int = min(
            MAX_WINDOW_TOKENS,
            tokenizer.model_max_length,
            getattr(self._network.config, "max_position_embeddings", None) or MAX_WINDOW_TOKENS,
        )

    @property
    def sample(self) -> str:
        return "a " * self.window

    def windows(self, text: str) -> list[dict[str, list[int]]]:
        """The network's inputs for each window of a text, all of which is in one or more."""
        # The tokenizer's own tokens around every window leave less room for a text's.
        room = self.window - self._tokenizer.num_special_tokens_to_add(False)
        tokens = self._tokenizer.encode(text, add_special_tokens=False)
        # Not by the tokenizer's own truncation: tokenizers 0.23 forgets all but the beginning of
        # what it cuts off (huggingface/tokenizers#2091).
        tokens.truncate(room, stride=int(room * OVERLAP))
        windows = map(self._tokenizer.post_process, [tokens, *tokens.overflowing])
        return [self._network_inputs(window) for window in windows]

    def _network_inputs(self, window: Any) -> dict[str, list[int]]:
        inputs = {
            "input_ids": window.ids,
            "attention_mask": window.attention_mask,
            "token_type_ids": window.type_ids,
        }
        return {name: values for name, values in inputs.items() if name in self._inputs}

    def scores(self, content: str) -> Iterator[dict[str, float]]:
        import torch

        # One by one: nothing is padded, so no model needs to know how, and other checks get
        # their turn in between.
        for window in self.windows(content):
            inputs = {name: torch.tensor([values]) for name, values in window.items()}
            yield self._network.scores(inputs)


class ImageClassifier:
    """A model for image classification.

    Args:
        path, device: see `TextClassifier`.

    Raises:
        UnusableModelError, UnusableDeviceError, Exception: as those of `TextClassifier`.
    """

    def __init__(self, path: str, device: str) -> None:
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self._processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        self._network = _Network(AutoModelForImageClassification, path, device)
        self.labels = self._network.labels

    @property
    def sample(self) -> bytes:
        from PIL import Image

        Image.new("RGB", (96, 64)).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    def scores(self, content: bytes) -> Iterator[dict[str, float]]:
        from PIL import Image

        with Image.open(io.BytesIO(content)) as file:
            image = file.convert("RGB")
        for box in views(*image.size):
            yield self._network.scores(self._processor(images=image.crop(box), return_tensors="pt"))


def views(width: int, height: int) -> list[tuple[int, int, int, int]]:
    """What a model is shown of an image: left, top, right and bottom, in pixels.

    Models see squares, and many cut what sticks out. So an image that is no square is shown whole,
    and in squares that overlap by half or more.
    """
    whole = (0, 0, width, height)
    side = min(width, height)
    if width == height:
        return [whole]
    longer = max(width, height)
    count = math.ceil(2 * longer / side) - 1
    starts = [round(index * (longer - side) / (count - 1)) for index in range(count)]
    if width > height:
        return [whole, *((start, 0, start + side, side) for start in starts)]
    return [whole, *((0, start, side, start + side) for start in starts)]


class _Network:
    """A classifier's network, whatever goes into it."""

    def __init__(self, auto_class: Any, path: str, device: str) -> None:
        import torch

        self._model, loading = auto_class.from_pretrained(
            path,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            # Some checkpoints are in float16, which CPUs are slow at.
            dtype=torch.float32,
        )
        # transformers makes up what is missing, the whole last layer if need be: a model that was
        # never trained to classify would answer at random.
        for what in ("missing_keys", "mismatched_keys"):
            if names := sorted(map(str, loading[what])):
                raise UnusableModelError(f"weights do not fit: {what}: {_some(names)}")
        self._model.eval().requires_grad_(False)
        self.config = self._model.config
        if self.config.problem_type == "regression":
            raise UnusableModelError("does regression, so it has no categories")
        self.labels = tuple(
            str(self.config.id2label[index]) for index in range(self.config.num_labels)
        )
        try:
            self._model.to(device)
        except Exception as error:
            # Of many types; the first line is for people.
            raise UnusableDeviceError(str(error).partition("\n")[0]) from None

    def scores(self, inputs: Any) -> dict[str, float]:
        """The score of each label for inputs of one row."""
        import torch

        with torch.inference_mode():
            inputs = {name: value.to(self._model.device) for name, value in inputs.items()}
            logits = self._model(**inputs).logits[0].float()
            # A single label is a yes or a no; softmax would always say yes.
            multi_label = self.config.problem_type == "multi_label_classification"
            independent = multi_label or len(self.labels) == 1
            found = logits.sigmoid() if independent else logits.softmax(-1)
            if not found.isfinite().all():
                raise FloatingPointError
        return highest(zip(self.labels, found.tolist(), strict=True))


def highest(scores: Iterable[tuple[str, float]]) -> dict[str, float]:
    """Each label's highest score."""
    found: dict[str, float] = {}
    for label, score in scores:
        found[label] = max(score, found.get(label, 0.0))
    return found


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"{shown} and {len(names) - 3} more" if len(names) > 3 else shown
