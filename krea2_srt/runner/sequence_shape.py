"""What a pack must know of a sequence."""

from collections.abc import Sequence
from dataclasses import dataclass

from krea2_srt.request import SIZE_MULTIPLE, ImageRequest


@dataclass(frozen=True)
class SequenceShape:
    """What a pack must know of a sequence.

    Attributes:
        text_tokens: of its prompt.
        rows, columns: of image tokens.
        guided: the next sequence of the pack is the same image with its negative prompt.
    """

    text_tokens: int
    rows: int
    columns: int
    guided: bool = False

    @property
    def image_tokens(self) -> int:
        return self.rows * self.columns

    @property
    def tokens(self) -> int:
        return self.text_tokens + self.image_tokens


def branch_shapes(image: ImageRequest, text_tokens: Sequence[int]) -> tuple[SequenceShape, ...]:
    """The branches of an image, the negative prompt's last.

    Args:
        image: what to generate.
        text_tokens: of the context of each.
    """
    rows, columns = image.height // SIZE_MULTIPLE, image.width // SIZE_MULTIPLE
    last = len(text_tokens) - 1
    return tuple(
        SequenceShape(tokens, rows, columns, guided=branch < last)
        for branch, tokens in enumerate(text_tokens)
    )
