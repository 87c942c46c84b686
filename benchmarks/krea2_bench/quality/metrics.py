"""PSNR, SSIM and CLIPScore of pictures, uint8 [height, width, 3]."""

from collections.abc import Sequence

import numpy as np

from krea2_bench.compare.pictures import psnr
from krea2_srt.errors import Krea2Error, first_line

__all__ = ["ClipError", "ClipScorer", "psnr", "ssim"]


class ClipError(Krea2Error):
    """A CLIP model that cannot be used."""


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity, at most 1; scikit-image's, with its defaults."""
    from skimage.metrics import structural_similarity

    return float(structural_similarity(a, b, channel_axis=2))


class ClipScorer:
    """CLIPScore: 100 times the cosine of the embeddings of a picture and of its prompt, at least 0
    (Hessel et al., 2021, as torchmetrics scales it).

    Args:
        path: folder or repo id of a CLIP model.

    Raises:
        ClipError: there is no such model.
    """

    def __init__(self, path: str) -> None:
        from transformers import CLIPModel, CLIPProcessor

        try:
            self._model = CLIPModel.from_pretrained(path).eval()
            self._processor = CLIPProcessor.from_pretrained(path)
        except (OSError, ValueError, ImportError) as error:
            raise ClipError(f"--clip: {path}: {first_line(error)}") from None

    def scores(self, pictures: Sequence[np.ndarray], prompts: Sequence[str]) -> list[float]:
        """CLIP's score of each picture with its prompt, of which CLIP reads the beginning."""
        import torch

        inputs = self._processor(
            text=list(prompts),
            images=list(pictures),
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.inference_mode():
            found = self._model(**inputs)
        # Both are of length 1.
        cosines = (found.image_embeds * found.text_embeds).sum(-1)
        return [max(0.0, 100 * cosine) for cosine in cosines.tolist()]
