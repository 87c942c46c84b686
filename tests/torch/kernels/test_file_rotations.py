"""Tokens for matrices that keep their file's rotation."""

import pytest
import torch

from krea2_srt.kernels.quantize import TokenFormat, quantize_tokens_triton
from krea2_srt.model.stored.markers import GROUPS
from tests.comparisons import relative_error
from tests.dialects import rotated


@pytest.mark.parametrize("group", [min(GROUPS), max(GROUPS)])
def test_a_kernel_rotates_in_every_group_that_a_file_can_have(group):
    x = torch.randn(1, 1024, generator=torch.Generator().manual_seed(group))
    tokens = quantize_tokens_triton(x, TokenFormat(rotation=group))
    assert relative_error(tokens.dequantized(), rotated(x, group)) < 0.04
