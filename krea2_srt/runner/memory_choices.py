"""Ways to use a GPU's memory, from the best to the least: what is given up in which order."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from krea2_srt.request import MAX_TEXT_TOKENS
from krea2_srt.runner.memory_sizes import GIB, PartSizes

IMAGE_TOKENS = tuple((side // 16) ** 2 for side in (2048, 1536, 1024, 768, 512))
MAX_GRAPH_TOKENS = IMAGE_TOKENS[0] + MAX_TEXT_TOKENS
"""The most that a graph is worth its memory for: one largest image."""

NO_GRAPHS = (0, 0)
_GRAPHS = ((MAX_GRAPH_TOKENS, 192), (8704, 160), (4608, 128), (1536, 64), NO_GRAPHS)
"""(most tokens, how many), best first."""

FEWEST_SEQUENCES = 16
"""At a time: fewer would leave a GPU without work beside the decodes of small pictures."""

FEW_SEQUENCES = (8, 4)
"""At a time, on a small GPU. Not one: a small picture would wait until a large one is done."""


@dataclass(frozen=True)
class MemoryRequest:
    """What is asked for.

    Attributes:
        max_pack_tokens: of a pack.
        max_image_tokens: of the largest image.
        max_paused_steps: that wait between two slices at a time.
        max_sequences: that have begun, at a time.
        max_pack_sequences: of a pack.
        branches_per_sequence: two with guidance.
        schedule_steps: of most schedules; a longer one is built rarely.
        cache_bytes: of prompts, schedules and layouts.
        adapter_bytes: of adapters beside the model.
        slot_bytes: of adapters' slots, where there are graphs.
        text_encoder: ``auto``, ``resident`` or ``offload``.
        max_graph_tokens: 0 is what fits.
        graphs: whether there may be any.
        needs_graphs: whether there must be some.
        streamed_blocks: blocks that are streamed; None is as few as possible.
        host_bytes: of host memory that may be taken; None is any.
    """

    max_pack_tokens: int
    max_image_tokens: int = IMAGE_TOKENS[0]
    max_paused_steps: int = 2
    max_sequences: int = 256
    max_pack_sequences: int = 64
    branches_per_sequence: int = 1
    schedule_steps: int = 8
    cache_bytes: int = 7 * GIB // 4
    adapter_bytes: int = 0
    slot_bytes: int = 0
    text_encoder: str = "auto"
    max_graph_tokens: int = 0
    graphs: bool = True
    needs_graphs: bool = False
    streamed_blocks: int | None = None
    host_bytes: int | None = None


@dataclass(frozen=True)
class Choice:
    """One way to use the memory.

    Attributes:
        image_tokens: of the largest image.
        streamed: blocks of the DiT.
        small: whether there are small caches, and as many prompts are encoded at a time as need no
            more memory than a step, but one.
        resident: whether the text encoder is.
        whole_budget: whether packs are as large as was asked for; otherwise they are what is left.
        decodes: beside the steps, at a time.
        graph_tokens, graphs: of the largest graph, and how many.
        sequences: that have begun, at a time.
    """

    image_tokens: int
    streamed: int
    small: bool
    resident: bool
    whole_budget: bool
    decodes: int
    graph_tokens: int
    graphs: int
    sequences: int


def choices(sizes: PartSizes, request: MemoryRequest) -> Iterator[Choice]:
    """From the best to the least; a step down the list costs users more than all before it.

    In this order: the number of sequences that have begun, down to 16; graphs of large packs; a
    second decode beside the steps; a budget of more than one largest image; all graphs; the
    encoder's place on the GPU; large caches, many prompts at a time, and more than a few sequences;
    the places of the DiT's blocks, of as few as possible; and the largest images.

    Blocks give way before images do: uploads hide behind the work of a large step, and a size that
    is refused is refused at any speed.
    """
    images = [request.max_image_tokens]
    images += [tokens for tokens in IMAGE_TOKENS if tokens < request.max_image_tokens]
    places = {"auto": (True, False), "resident": (True,), "offload": (False,)}
    graphs, counts = _graphs(request), _counts(request.max_sequences)
    few = [counts[-1], *(count for count in FEW_SEQUENCES if count < counts[-1])]
    # Graphs of small packs are worth more than a second decode, or two largest images in a pack.
    some = [graph for graph in graphs if graph[0]]
    with_graphs = list(product((True, False), (2, 1), some))
    without = list(product((True, False), (2, 1), [NO_GRAPHS]))
    ways: Sequence[bool] = (False, True)
    if request.needs_graphs:  # where all is given up for the sake of memory, there are none
        ways, without = (False,), []
    for image, streamed, small, resident in product(
        images, _streamed(sizes, request), ways, places[request.text_encoder]
    ):
        # No graph is captured of blocks that move.
        work = without[-1:] if small else without if streamed else with_graphs + without
        for (whole, decodes, (tokens, graph_count)), sequences in product(
            work, few if small else counts
        ):
            yield Choice(
                image, streamed, small, resident, whole, decodes, tokens, graph_count, sequences
            )


def _graphs(request: MemoryRequest) -> Sequence[tuple[int, int]]:
    if not request.graphs:
        return [NO_GRAPHS]
    if not request.max_graph_tokens:
        return _GRAPHS
    count = next((n for most, n in reversed(_GRAPHS) if most >= request.max_graph_tokens), 192)
    smaller = [graph for graph in _GRAPHS if graph[0] < request.max_graph_tokens]
    return [(request.max_graph_tokens, count), *smaller]


def _counts(most: int) -> list[int]:
    counts = [most]
    while counts[-1] > FEWEST_SEQUENCES:
        counts.append(max(FEWEST_SEQUENCES, counts[-1] // 2))
    return counts


def _streamed(sizes: PartSizes, request: MemoryRequest) -> list[int]:
    """How many blocks may be streamed: each makes more room than fewer, whose buffers count too."""
    if request.streamed_blocks is not None:
        return [request.streamed_blocks]
    found = [0]
    for count in range(1, len(sizes.blocks) + 1):
        if sizes.dit_on_device(count) < sizes.dit_on_device(found[-1]):
            found.append(count)
    return found
