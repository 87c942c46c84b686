"""How much work a step is: operations and bytes, from the model's sizes."""

from collections.abc import Sequence

from krea2_srt.model.config import Krea2Config


def step_flops(config: Krea2Config, branches: Sequence[int]) -> tuple[float, float]:
    """Floating-point operations of a step of a pack: of its matrices, and of its attention."""
    tokens, squares = sum(branches), sum(branch * branch for branch in branches)
    width = config.num_attention_heads * config.attention_head_dim
    attention = 4 * config.num_layers * width * squares
    return 2 * step_weight_bytes(config) * tokens, attention


def step_weight_bytes(config: Krea2Config) -> int:
    """Weights of all blocks at one byte each."""
    hidden, head = config.hidden_size, config.attention_head_dim
    projection = 2 * hidden + 2 * config.num_key_value_heads * head
    block = hidden * (projection + hidden + 3 * config.intermediate_size)
    return config.num_layers * block
