"""What fits on a GPU: token budget, graphs, and what stays resident. Pure arithmetic.

    weights | caches | adapters | sequences | graphs | work: the larger of a step and of encoding,
    and decodes beside it | workspace of libraries

Encoding and steps share their memory, since one follows the other on one stream; decodes run
beside them on their own.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product

from krea2_srt.errors import ConfigError
from krea2_srt.request import MAX_TEXT_TOKENS

GIB = 2**30

MARGIN_SHARE, MARGIN_BYTES = 0.05, GIB // 4
"""Share and bytes of the GPU's memory left to the allocator's fragments and CUDA's libraries."""

GRAPH_BYTES = 6 * 2**20
"""Bytes of a captured graph's own nodes. An estimate: some 400 kernels with their arguments."""

IMAGE_TOKENS = tuple((side // 16) ** 2 for side in (2048, 1536, 1024, 768, 512))
MAX_GRAPH_TOKENS = IMAGE_TOKENS[0] + MAX_TEXT_TOKENS
"""The most that a graph is worth its memory for: one largest image."""

_GRAPHS = ((MAX_GRAPH_TOKENS, 192), (8704, 160), (4608, 128), (1536, 64), (0, 0))
"""(most tokens, how many), best first."""

FEWEST_SEQUENCES = 16
"""At a time: fewer would leave a GPU without work beside the decodes of small pictures."""


@dataclass(frozen=True)
class DecodeSizes:
    """Bytes of a decode. It attends at an eighth of the picture's width and height, goes on with
    the whole picture up to half of them, and ends in tiles.

    Attributes:
        attention_per_pixel: while it attends, beside the scores.
        score_bytes: of the scores that are computed at a time, at most.
        score_pixels: of the picture, for each of the pixels that attend.
        whole_per_pixel: up to half the width and height.
        kept_per_pixel: of the picture while a tile is computed.
        tile_per_pixel: of the tile.
        tile: pixels a side, with margins; 0 is no tiles.
    """

    attention_per_pixel: float
    score_bytes: int
    score_pixels: int
    whole_per_pixel: float
    kept_per_pixel: float
    tile_per_pixel: float
    tile: int

    def of(self, pixels: int) -> int:
        """Bytes for decoding a picture of so many pixels, at the fullest moment."""
        scores = 8 * (pixels // self.score_pixels) ** 2
        attention = self.attention_per_pixel * pixels + min(self.score_bytes, scores)
        tile = min(pixels, self.tile**2) if self.tile else pixels
        tiles = self.kept_per_pixel * pixels + self.tile_per_pixel * tile
        return round(max(attention, self.whole_per_pixel * pixels, tiles))


@dataclass(frozen=True)
class PartSizes:
    """Bytes of a checkpoint's parts in the dtypes that they run in.

    Attributes:
        dit, text_encoder, vae: weights.
        quantized: whether those of the DiT are in 8 bits already.
        text_encoder_unit: the largest piece that is on the GPU at a time when it is offloaded.
        step_per_token: at the fullest moment of a step.
        paused_per_token: of a step that waits between two slices.
        modulation_row: of one step of one branch.
        schedule_row: of one step of a schedule while it is built.
        patch: of an image token of a sequence.
        context: of a text token of a branch.
        encode: at the fullest moment of encoding.
        encode_graph: the same in the largest graph.
        decoder: of a decode.
        libraries: their workspaces.
        graph_buffers: of all graphs together, beside ``graph_per_token``.
        graph_per_token: of the buffers.
    """

    dit: int
    text_encoder: int
    vae: int
    text_encoder_unit: int
    step_per_token: int
    paused_per_token: int
    modulation_row: int
    schedule_row: int
    patch: int
    context: int
    encode: int
    encode_graph: int
    decoder: DecodeSizes
    libraries: int
    graph_buffers: int
    graph_per_token: int
    quantized: bool = False

    def decode(self, image_tokens: int) -> int:
        """Bytes of one image's decode."""
        return self.decoder.of(image_tokens * 256)

    def graphs(self, tokens: int, count: int, encoder: bool) -> int:
        """Bytes of graphs of up to so many tokens, with their buffers and the pool that they share;
        with or without those of the text encoder, which have a pool of their own.
        """
        if not tokens:
            return 0
        pools = self.step_per_token * tokens + (self.encode_graph if encoder else 0)
        return self.graph_buffers + self.graph_per_token * tokens + pools + count * GRAPH_BYTES

    def sequences(self, count: int, image_tokens: int) -> int:
        """Bytes of sequences that have begun: the largest, with the longest prompts."""
        return count * (image_tokens * self.patch + MAX_TEXT_TOKENS * self.context)


@dataclass(frozen=True)
class MemoryRequest:
    """What is asked for.

    Attributes:
        max_pack_tokens: of a pack.
        max_image_tokens: of the largest image.
        max_paused_steps: that wait between two slices at a time.
        max_sequences: that have begun, at a time.
        max_branches: of a pack.
        schedule_steps: of most schedules; a longer one is built rarely.
        cache_bytes: of prompts, schedules and layouts.
        adapter_bytes: of adapters beside the model.
        text_encoder: ``auto``, ``resident`` or ``offload``.
        max_graph_tokens: 0 is what fits.
        graphs: whether there may be any.
    """

    max_pack_tokens: int
    max_image_tokens: int = IMAGE_TOKENS[0]
    max_paused_steps: int = 2
    max_sequences: int = 256
    max_branches: int = 64
    schedule_steps: int = 8
    cache_bytes: int = 7 * GIB // 4
    adapter_bytes: int = 0
    text_encoder: str = "auto"
    max_graph_tokens: int = 0
    graphs: bool = True


@dataclass(frozen=True)
class MemoryPlan:
    """What was decided.

    Attributes:
        free, total: bytes of the GPU when it was made.
        text_encoder_resident: or in host memory between uses.
        max_pack_tokens, max_image_tokens: of a pack, and of an image.
        max_sequences: that have begun, at a time.
        overlapped_decodes: images decoded at a time.
        max_graph_tokens, max_graphs: 0 where there are none.
        cache_share: of the wished caches.
        rows: (what, bytes, note) of everything that takes memory.
        streamed_blocks: how many of the transformer's come from host memory as they run.
    """

    free: int
    total: int
    text_encoder_resident: bool
    max_pack_tokens: int
    max_image_tokens: int
    max_sequences: int
    overlapped_decodes: int
    max_graph_tokens: int
    max_graphs: int
    cache_share: float
    rows: tuple[tuple[str, int, str], ...]
    streamed_blocks: int = 0

    @property
    def planned(self) -> int:
        """Bytes of all rows."""
        return sum(size for _, size, _ in self.rows)

    def table(self) -> str:
        """The plan in words, for a log."""
        lines = [*self.rows, ("free", self.free - self.planned, f"of {self.free / GIB:.1f} GiB")]
        return "\n".join(f"  {what:<16}{size / GIB:7.2f} GiB  {note}" for what, size, note in lines)


@dataclass(frozen=True)
class _Candidate:
    """One way to use the memory; without the whole budget that was wished for, what is left."""

    image_tokens: int
    resident: bool
    whole_budget: bool
    decodes: int
    graph_tokens: int
    graphs: int
    sequences: int


def plan_memory(free: int, total: int, sizes: PartSizes, request: MemoryRequest) -> MemoryPlan:
    """Decide what to do with a GPU's memory.

    What does not fit is given up in this order: the number of sequences that have begun, graphs of
    large packs, a second decode beside the steps, a budget of more than one largest image, all
    graphs, the encoder's place on the GPU, and the largest images.

    Args:
        free, total: bytes of the GPU.
        sizes: of the model.
        request: what is asked for.

    Raises:
        ConfigError: the model does not fit, and what would help.
    """
    margin = int(total * MARGIN_SHARE) + MARGIN_BYTES
    # On a small GPU the caches leave the most to work.
    cache = min(request.cache_bytes, max(0, free) // 20)
    room = free - margin - sizes.dit - sizes.vae - cache - request.adapter_bytes - sizes.libraries
    for candidate in _candidates(request):
        encoder = sizes.text_encoder if candidate.resident else 0
        beside = encoder + candidate.decodes * sizes.decode(candidate.image_tokens)
        beside += _paused(candidate, sizes, request) + _sequences(candidate, sizes, request)
        left = (
            room
            - beside
            - sizes.graphs(candidate.graph_tokens, candidate.graphs, candidate.resident)
        )
        encode = sizes.encode + (0 if candidate.resident else sizes.text_encoder_unit)
        budget = min(request.max_pack_tokens, left // sizes.step_per_token)
        least = request.max_pack_tokens if candidate.whole_budget else 0
        least = max(least, candidate.image_tokens + MAX_TEXT_TOKENS)
        if left >= encode and budget >= min(least, request.max_pack_tokens):
            work = max(encode, budget * sizes.step_per_token)
            return _plan(free, total, sizes, candidate, budget, work, cache, margin, request)
    raise _too_small(free, sizes, cache + margin + request.adapter_bytes, request)


def _candidates(request: MemoryRequest) -> Iterator[_Candidate]:
    """From the best to the least."""
    sizes = [request.max_image_tokens]
    sizes += [tokens for tokens in IMAGE_TOKENS if tokens < request.max_image_tokens]
    resident = {"auto": (True, False), "resident": (True,), "offload": (False,)}
    graphs: tuple[tuple[int, int], ...] = _GRAPHS if request.graphs else _GRAPHS[-1:]
    if request.graphs and request.max_graph_tokens:
        count = next((n for most, n in reversed(_GRAPHS) if most >= request.max_graph_tokens), 192)
        smaller = [g for g in _GRAPHS if g[0] < request.max_graph_tokens]
        graphs = ((request.max_graph_tokens, count), *smaller)
    counts = [request.max_sequences]
    while counts[-1] > FEWEST_SEQUENCES:
        counts.append(max(FEWEST_SEQUENCES, counts[-1] // 2))
    # Graphs of small packs are worth more than a second decode, or two largest images in a pack.
    some = [graph for graph in graphs if graph[0]]
    work = [*product((True, False), (2, 1), some), *product((True, False), (2, 1), _GRAPHS[-1:])]
    for image, keep, (whole, decodes, (tokens, graph_count)), sequences in product(
        sizes, resident[request.text_encoder], work, counts
    ):
        yield _Candidate(image, keep, whole, decodes, tokens, graph_count, sequences)


def _paused(candidate: _Candidate, sizes: PartSizes, request: MemoryRequest) -> int:
    """Only steps of large images are sliced."""
    tokens = candidate.image_tokens + MAX_TEXT_TOKENS
    return request.max_paused_steps * tokens * sizes.paused_per_token


def _sequences(candidate: _Candidate, sizes: PartSizes, request: MemoryRequest) -> int:
    """All that have begun, the modulation of a pack, and a schedule while it is built."""
    found = sizes.sequences(candidate.sequences, candidate.image_tokens)
    found += request.max_branches * sizes.modulation_row
    return found + request.schedule_steps * sizes.schedule_row


def _plan(
    free: int,
    total: int,
    sizes: PartSizes,
    candidate: _Candidate,
    budget: int,
    work: int,
    cache: int,
    margin: int,
    request: MemoryRequest,
) -> MemoryPlan:
    side = round((candidate.image_tokens * 256) ** 0.5)
    where = "resident" if candidate.resident else "offloaded: on the host between uses"
    graphs = sizes.graphs(candidate.graph_tokens, candidate.graphs, candidate.resident)
    rows = (
        ("transformer", sizes.dit, "resident"),
        ("text encoder", sizes.text_encoder if candidate.resident else 0, where),
        ("VAE decoder", sizes.vae, "resident"),
        ("caches", cache, "prompts, schedules, layouts"),
        *(
            [("adapters", request.adapter_bytes, "beside the model")]
            if request.adapter_bytes
            else []
        ),
        (
            "CUDA graphs",
            graphs,
            f"up to {candidate.graphs} of packs up to {candidate.graph_tokens} tokens"
            if graphs
            else "none",
        ),
        (
            "sequences",
            _sequences(candidate, sizes, request),
            f"{candidate.sequences} at a time, and a pack's modulation",
        ),
        ("steps, encoding", work, f"packs up to {budget} tokens"),
        (
            "paused steps",
            _paused(candidate, sizes, request),
            f"{request.max_paused_steps} between two slices",
        ),
        (
            "decodes",
            candidate.decodes * sizes.decode(candidate.image_tokens),
            f"{candidate.decodes} at a time, up to {side}x{side}",
        ),
        ("libraries", sizes.libraries, "workspace of cuBLAS and cuDNN"),
        ("margin", margin, "allocator, CUDA's kernels"),
    )
    return MemoryPlan(
        free,
        total,
        candidate.resident,
        budget,
        candidate.image_tokens,
        candidate.sequences,
        candidate.decodes,
        candidate.graph_tokens,
        candidate.graphs,
        cache / request.cache_bytes if request.cache_bytes else 1.0,
        rows,
    )


def _too_small(free: int, sizes: PartSizes, fixed: int, request: MemoryRequest) -> ConfigError:
    resident = request.text_encoder == "resident"
    encoder = sizes.text_encoder if resident else sizes.text_encoder_unit
    smallest = min(IMAGE_TOKENS[-1], request.max_image_tokens)
    step = (smallest + MAX_TEXT_TOKENS) * sizes.step_per_token
    needed = sizes.dit + sizes.vae + sizes.libraries + fixed + encoder + max(sizes.encode, step)
    fewest = min(FEWEST_SEQUENCES, request.max_sequences)
    least = _Candidate(smallest, False, False, 1, 0, 0, fewest)
    needed += sizes.decode(smallest) + _sequences(least, sizes, request)
    helps = [] if sizes.quantized else ["--quantization fp8 halves the transformer"]
    if resident:
        helps.append("text_encoder auto leaves the encoder on the host")
    if request.adapter_bytes:
        helps.append("a smaller lora_memory_gib leaves more to the model")
    message = f"{free / GIB:.1f} GiB are free, at least {needed / GIB:.1f} are needed"
    return ConfigError("; ".join([f"gpu_memory: {message}", *helps]))
