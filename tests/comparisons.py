"""How far results are apart, and what all compare with."""

import torch

CPU = torch.device("cpu")
PROMPT = "a red fox sitting in fresh snow, golden hour, photorealistic"


def relative_error(got: torch.Tensor, expected: torch.Tensor) -> float:
    """|got - expected| / |expected| in the 2-norm, in float64."""
    difference = torch.linalg.vector_norm(got.double() - expected.double())
    return (difference / torch.linalg.vector_norm(expected.double())).item()


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [0, 1]."""
    assert a.shape == b.shape
    return -10 * torch.log10((a.double() - b.double()).square().mean()).item()
