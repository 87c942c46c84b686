"""The VAE's norm, in Triton's interpreter, against float64."""

import pytest
import torch

from krea2_srt.kernels.channel_norm import channel_norm, channel_norm_triton


@pytest.mark.parametrize("norm", [channel_norm, channel_norm_triton])
@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(1, 16, 1, 1), (1, 96, 3, 5), (2, 33, 7, 9), (1, 384, 5, 3)])
def test_channel_norm(norm, silu, dtype, shape, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator).to(dtype)
    x[0, :, 0, 0] = 0
    x = x.contiguous(memory_format=torch.channels_last)
    gamma = torch.randn(shape[1], 1, 1, generator=generator).to(dtype)
    before, empty_like = x.clone(), torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda t: empty_like(t).fill_(torch.nan))
    expected = torch.nn.functional.normalize(x.double(), dim=1) * gamma.double() * shape[1] ** 0.5
    if silu:
        expected = torch.nn.functional.silu(expected)
    got = norm(x, gamma, silu)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(x, before)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-2
    assert (got.double() - expected).abs().max() <= tolerance * expected.abs().max()
