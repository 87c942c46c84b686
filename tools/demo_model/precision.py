"""In which precision this machine multiplies fastest."""

import torch

FAST_BFLOAT16 = bool(torch.cpu.get_capabilities().get("avx512_bf16"))
"""Whether the CPU has instructions for it; without them it is ten times slower than float32."""

FASTEST = torch.bfloat16 if FAST_BFLOAT16 else torch.float32


def fast() -> torch.autocast:
    """Within it, matrices and convolutions are multiplied so."""
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=FAST_BFLOAT16)
