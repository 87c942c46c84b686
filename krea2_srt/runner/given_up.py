"""What a choice gives up of what was asked for, in words."""

from collections.abc import Iterator

from krea2_srt.runner.memory_choices import MAX_GRAPH_TOKENS, Choice, MemoryRequest
from krea2_srt.runner.memory_sizes import GIB, PartSizes

MIB = 2**20


def given_up(
    choice: Choice,
    sizes: PartSizes,
    request: MemoryRequest,
    *,
    budget: int,
    prompts: int,
    pack_sequences: int,
    cache_bytes: int,
) -> Iterator[str]:
    """A line for each, first what users notice most.

    Args:
        choice: what was chosen.
        sizes: of the model.
        request: what was asked for.
        budget: tokens of a pack.
        prompts: that are encoded together.
        pack_sequences: of a pack.
        cache_bytes: of all caches.
    """
    if choice.image_tokens < request.max_image_tokens:
        side = square_side(choice.image_tokens)
        yield f"images of more than {side}x{side} pixels"
    if choice.streamed:
        yield _streamed(choice.streamed, sizes)
    if not choice.resident and request.text_encoder == "auto":
        size = sizes.text_encoder / GIB
        yield f"the text encoder's place: {size:.1f} GiB come from host memory for new prompts"
    if request.graphs and not choice.graph_tokens:
        yield "CUDA graphs"
    elif request.graphs and choice.graph_tokens < (request.max_graph_tokens or MAX_GRAPH_TOKENS):
        yield f"CUDA graphs of packs of more than {choice.graph_tokens} tokens"
    if budget < request.max_pack_tokens:
        yield f"packs of more than {budget} tokens"
    if choice.decodes < 2:
        yield "a second decode beside the steps"
    if choice.sequences < request.max_sequences:
        yield f"more than {choice.sequences} images begun at a time"
    if pack_sequences < request.max_pack_sequences:
        yield f"more than {pack_sequences} images in a pack"
    if choice.small and cache_bytes < request.cache_bytes:
        yield f"caches of more than {cache_bytes / MIB:.0f} MiB"
    if prompts < len(sizes.encodes):
        yield f"more than {prompts} {'prompts' if prompts > 1 else 'prompt'} encoded at a time"


def square_side(image_tokens: int) -> int:
    """Pixels a side of a square image with so many tokens."""
    return round((image_tokens * 256) ** 0.5)


def _streamed(count: int, sizes: PartSizes) -> str:
    """What it costs, and what would avoid it."""
    text = f"the places of {count} of {len(sizes.blocks)} blocks: "
    text += f"{sizes.streamed(count) / GIB:.1f} GiB come from host memory in each step"
    if sizes.quantized:
        return text
    halved = sizes.dit - sum(sizes.blocks) // 2
    helps = "avoid" if halved <= sizes.dit_on_device(count) else "at least halve"
    return f"{text}, which --quantization int8 would {helps}"
