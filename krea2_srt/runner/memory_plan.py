"""What fits on a GPU: token budget, graphs, and what stays resident. Pure arithmetic.

    weights | caches | adapters | sequences | graphs | work: the larger of a step and of encoding,
    and decodes beside it | workspace of libraries

Encoding and steps share their memory, since one follows the other on one stream; decodes run
beside them on their own. What does not fit is given up in the order of `choices`.
"""

from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter

from krea2_srt.errors import ConfigError
from krea2_srt.request import MAX_TEXT_TOKENS
from krea2_srt.runner.given_up import given_up, square_side
from krea2_srt.runner.memory_choices import IMAGE_TOKENS, Choice, MemoryRequest, choices
from krea2_srt.runner.memory_sizes import GIB, PartSizes

MARGIN_SHARE, MARGIN_BYTES = 0.05, GIB // 4
"""Share and bytes of the GPU's memory left to the allocator's fragments and CUDA's libraries."""

CACHE_SHARE, SMALL_CACHE_BYTES = 1 / 20, 256 * 2**20
"""The most that caches take of a GPU's free memory, and where all is given up for its sake: a
dozen prompts, and the schedules of five sizes.
"""


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
        streamed_blocks: of the DiT, in pinned host memory and on the GPU only while they run; see
            `streamed_positions`. 0 is all resident.
        streamed_bytes: that come to the GPU in each step.
        offloaded_bytes: of the text encoder, that come to the GPU for new prompts.
        max_encoded_prompts: that are encoded together.
        max_pack_sequences: of a pack.
        pinned_bytes: of host memory.
        given_up: in words, of what was asked for.
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
    streamed_blocks: int
    streamed_bytes: int
    offloaded_bytes: int
    max_encoded_prompts: int
    max_pack_sequences: int
    pinned_bytes: int
    given_up: tuple[str, ...]

    @property
    def planned(self) -> int:
        """Bytes of all rows."""
        return sum(size for _, size, _ in self.rows)

    def table(self) -> str:
        """The plan in words, for a log."""
        lines = [*self.rows, ("free", self.free - self.planned, f"of {self.free / GIB:.1f} GiB")]
        return "\n".join(f"  {what:<16}{size / GIB:7.2f} GiB  {note}" for what, size, note in lines)

    def report(self) -> str:
        """The table, the host memory that is needed, and a line for each thing given up."""
        lines = [self.table()]
        if self.pinned_bytes:
            lines.append(f"  host memory     {self.pinned_bytes / GIB:7.2f} GiB  pinned")
        return "\n".join(lines + [f"  given up: {what}" for what in self.given_up])


@dataclass(frozen=True)
class _Bytes:
    """What a choice takes beside steps and encoding."""

    transformer: int
    text_encoder: int
    vae: int
    caches: int
    adapters: int
    graphs: int
    sequences: int
    paused: int
    decodes: int
    libraries: int
    margin: int

    @property
    def total(self) -> int:
        return sum(vars(self).values())


def plan_memory(free: int, total: int, sizes: PartSizes, request: MemoryRequest) -> MemoryPlan:
    """Decide what to do with a GPU's memory, and with the host's: the first of `choices` that fits.

    Args:
        free, total: bytes of the GPU.
        sizes: of the model.
        request: what is asked for.

    Raises:
        ConfigError: the model does not fit, or its settings do not fit together, and what would
            help.
    """
    _check(sizes, request)
    needed: list[int] = []
    pinned: list[int] = []
    for _, group in groupby(choices(sizes, request), key=attrgetter("image_tokens", "streamed")):
        ways = list(group)
        # The last of them takes the least of everything.
        least = _bytes(ways[-1], free, total, sizes, request).total
        needed.append(least + _least_work(ways[-1], sizes, request))
        if needed[-1] > free:
            continue
        for choice in ways:
            taken = _bytes(choice, free, total, sizes, request)
            if taken.total + _least_work(choice, sizes, request) > free:
                continue
            on_host = sizes.pinned(choice.streamed, choice.resident)
            if request.host_bytes is None or on_host <= request.host_bytes:
                return _plan(choice, free, total, taken, sizes, request)
            pinned.append(on_host)
    if pinned:
        raise _host_too_small(min(pinned), sizes, request)
    raise _too_small(free, min(needed), sizes, request)


def _least_work(choice: Choice, sizes: PartSizes, request: MemoryRequest) -> int:
    """Bytes that steps and encoding take at least."""
    whole = request.max_pack_tokens if choice.whole_budget else 0
    # The largest image steps alone whatever the budget.
    step = max(whole, _largest_step(choice, request)) * sizes.step_per_token
    prompts = 1 if choice.small else len(sizes.encodes)
    return max(step, sizes.encode(prompts, choice.resident))


def _largest_step(choice: Choice, request: MemoryRequest) -> int:
    """Tokens of the largest image's step: both of its branches, under guidance."""
    return request.branches_per_sequence * (choice.image_tokens + MAX_TEXT_TOKENS)


def _check(sizes: PartSizes, request: MemoryRequest) -> None:
    blocks = len(sizes.blocks)
    if request.streamed_blocks is not None and request.streamed_blocks > blocks:
        raise ConfigError(
            f"streamed_blocks: must be at most {blocks}, which the transformer has, "
            f"got {request.streamed_blocks}"
        )


def _bytes(
    choice: Choice, free: int, total: int, sizes: PartSizes, request: MemoryRequest
) -> _Bytes:
    # Steps of large images alone are sliced.
    largest = _largest_step(choice, request)
    branches = _pack_sequences(choice, request) * request.branches_per_sequence
    # All that have begun, the modulation of a pack, and a schedule while it is built.
    sequences = sizes.sequences(choice.sequences, choice.image_tokens)
    sequences += branches * sizes.modulation_row + request.schedule_steps * sizes.schedule_row
    # On a small GPU the caches leave the most to work.
    cache = min(request.cache_bytes, int(max(0, free) * CACHE_SHARE))
    return _Bytes(
        transformer=sizes.dit_on_device(choice.streamed),
        text_encoder=sizes.text_encoder if choice.resident else 0,
        vae=sizes.vae,
        caches=min(cache, SMALL_CACHE_BYTES) if choice.small else cache,
        adapters=request.adapter_bytes + (request.slot_bytes if choice.graph_tokens else 0),
        graphs=sizes.graphs(choice.graph_tokens, choice.graphs, choice.resident),
        sequences=sequences,
        paused=request.max_paused_steps * largest * sizes.paused_per_token,
        decodes=choice.decodes * sizes.decode(choice.image_tokens),
        libraries=sizes.libraries + sizes.int8_sums,
        margin=int(total * MARGIN_SHARE) + MARGIN_BYTES,
    )


def _pack_sequences(choice: Choice, request: MemoryRequest) -> int:
    most = choice.sequences if choice.small else request.max_pack_sequences
    return min(request.max_pack_sequences, most)


def _plan(
    choice: Choice,
    free: int,
    total: int,
    taken: _Bytes,
    sizes: PartSizes,
    request: MemoryRequest,
) -> MemoryPlan:
    budget = min(request.max_pack_tokens, (free - taken.total) // sizes.step_per_token)
    work = max(_least_work(choice, sizes, request), budget * sizes.step_per_token)
    prompts = max(
        count
        for count in range(1, len(sizes.encodes) + 1)
        if sizes.encode(count, choice.resident) <= work
    )
    pack_sequences = _pack_sequences(choice, request)
    return MemoryPlan(
        free,
        total,
        choice.resident,
        budget,
        choice.image_tokens,
        choice.sequences,
        choice.decodes,
        choice.graph_tokens,
        choice.graphs,
        taken.caches / request.cache_bytes if request.cache_bytes else 1.0,
        _rows(choice, taken, budget, work, sizes, request),
        choice.streamed,
        sizes.streamed(choice.streamed),
        0 if choice.resident else sizes.text_encoder,
        prompts,
        pack_sequences,
        sizes.pinned(choice.streamed, choice.resident),
        tuple(
            given_up(
                choice,
                sizes,
                request,
                budget=budget,
                prompts=prompts,
                pack_sequences=pack_sequences,
                cache_bytes=taken.caches,
            )
        ),
    )


def _rows(
    choice: Choice,
    taken: _Bytes,
    budget: int,
    work: int,
    sizes: PartSizes,
    request: MemoryRequest,
) -> tuple[tuple[str, int, str], ...]:
    side = square_side(choice.image_tokens)
    resident = len(sizes.blocks) - choice.streamed
    dit = f"{resident} blocks resident, {choice.streamed} streamed" if choice.streamed else ""
    encoder = "resident" if choice.resident else "offloaded: on the host between uses"
    graphs = f"up to {choice.graphs} of packs up to {choice.graph_tokens} tokens"
    return (
        ("transformer", taken.transformer, dit or "resident"),
        ("text encoder", taken.text_encoder, encoder),
        ("VAE decoder", taken.vae, "resident"),
        ("caches", taken.caches, "prompts, schedules, layouts"),
        *([("adapters", taken.adapters, "beside the model")] if taken.adapters else []),
        ("CUDA graphs", taken.graphs, graphs if taken.graphs else "none"),
        (
            "sequences",
            taken.sequences,
            f"{choice.sequences} at a time, and a pack's modulation",
        ),
        ("steps, encoding", work, f"packs up to {budget} tokens"),
        ("paused steps", taken.paused, f"{request.max_paused_steps} between two slices"),
        ("decodes", taken.decodes, f"{choice.decodes} at a time, up to {side}x{side}"),
        ("libraries", taken.libraries, "workspace of cuBLAS and cuDNN"),
        ("margin", taken.margin, "allocator, CUDA's kernels"),
    )


def _too_small(free: int, needed: int, sizes: PartSizes, request: MemoryRequest) -> ConfigError:
    helps = [] if sizes.quantized else ["--quantization int8 halves the transformer"]
    if request.text_encoder == "resident":
        helps.append("text_encoder auto leaves the encoder on the host")
    if request.streamed_blocks is not None and request.streamed_blocks < len(sizes.blocks):
        helps.append(
            "streamed_blocks auto, without cuda_graphs on, leaves blocks of the transformer on the "
            "host"
        )
    if request.needs_graphs:
        helps.append("cuda_graphs auto does without graphs")
    if request.adapter_bytes:
        helps.append("a smaller lora_memory_gib leaves more to the model")
    if not helps:
        helps.append(
            "what else is on the GPU may be ended, gpu_memory_gib be raised where it is set, or "
            "another GPU be taken"
        )
    message = f"{free / GIB:.1f} GiB are free, at least {needed / GIB:.1f} are needed"
    return ConfigError("; ".join([f"gpu_memory: {message}", *helps]))


def _host_too_small(needed: int, sizes: PartSizes, request: MemoryRequest) -> ConfigError:
    assert request.host_bytes is not None
    helps = [] if sizes.quantized else ["--quantization int8 halves the transformer"]
    if request.max_image_tokens > IMAGE_TOKENS[-1]:
        helps.append("a smaller max_side or max_pixels leaves more of the GPU to the model")
    message = (
        f"{request.host_bytes / GIB:.1f} GiB can be taken, at least {needed / GIB:.1f} are needed "
        "for what does not fit on the GPU"
    )
    return ConfigError("; ".join([f"host memory: {message}", *helps]))
