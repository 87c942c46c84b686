"""The cost model: milliseconds of a unit of work, from counts of tokens and pixels.

    step = max(floor, launch + per_token * sum(t) + per_square * sum(t^2))

over the branches t of a pack: linear layers cost by tokens, attention by their squares, and a small
pack takes as long as reading the weights. The prior is the roofline of the released model on an
H200 (790 TFLOP/s, 4.3 TB/s); a machine's own figures come from timing a few packs.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

FLOPS_PER_TOKEN = 24.3e9
FLOPS_PER_SQUARED_TOKEN = 0.688e6
WEIGHT_BYTES = 24.3e9
"""FLOPs per token and squared token of the released DiT's step, and bytes of its bf16 weights."""

FLOPS_PER_PIXEL = 4.5e6
"""FLOPs per pixel of the released VAE's decoder at 1024 x 1024, margins and attention included."""


@dataclass(frozen=True)
class CostModel:
    """Estimates of time, all in milliseconds.

    Attributes:
        floor: the least time of one forward.
        launch: added to every forward.
        per_token: of a forward.
        per_square: per squared token of a branch.
        blocks: transformer blocks that a forward can be cut into.
        encode_launch, encode_per_token: of encoding prompts.
        decode_launch, decode_per_pixel: of one image's VAE decode.
    """

    floor: float
    launch: float
    per_token: float
    per_square: float
    blocks: int = 28
    encode_launch: float = 0.0
    encode_per_token: float = 0.0
    decode_launch: float = 0.0
    decode_per_pixel: float = 0.0

    def step(self, branches: Iterable[int]) -> float:
        """One step of a pack whose branches have these many tokens."""
        tokens = squares = 0
        for branch in branches:
            tokens += branch
            squares += branch * branch
        return self.forward(tokens, squares)

    def forward(self, tokens: int, squares: int) -> float:
        """The same from the sums of tokens and of their squares."""
        ms = self.launch + self.per_token * tokens + self.per_square * squares
        # Not max(): a turn comes here some hundred times.
        return ms if ms > self.floor else self.floor

    def encode(self, text_tokens: int) -> float:
        """Encoding prompts with this many tokens in all."""
        return self.encode_launch + self.encode_per_token * text_tokens

    def decode(self, pixels: int) -> float:
        """Decoding one image."""
        return self.decode_launch + self.decode_per_pixel * pixels

    def scaled(self, factor: float) -> "CostModel":
        """The model of a machine whose steps take this many times as long."""
        return replace(
            self,
            floor=self.floor * factor,
            launch=self.launch * factor,
            per_token=self.per_token * factor,
            per_square=self.per_square * factor,
        )

    def blocks_per_slice(self, step_ms: float, max_turn_ms: float) -> int:
        """How many blocks of a step fit into a turn; at least one, at most all."""
        if step_ms <= max_turn_ms:
            return self.blocks
        return max(1, int(self.blocks * max_turn_ms / step_ms))


def roofline(
    flops_per_second: float = 790e12,
    bytes_per_second: float = 4.3e12,
    *,
    flops_per_token: float = FLOPS_PER_TOKEN,
    flops_per_squared_token: float = FLOPS_PER_SQUARED_TOKEN,
    weight_bytes: float = WEIGHT_BYTES,
    blocks: int = 28,
) -> CostModel:
    """What the hardware's limits allow: the prior.

    The text encoder (4 B parameters, bf16) and the VAE decoder (4.5 MFLOP a pixel at 1024 x 1024,
    which convolutions run at a quarter of the matmul rate) are rough; both are small beside the
    steps.
    """
    return CostModel(
        floor=weight_bytes / bytes_per_second * 1e3,
        launch=0.0,
        per_token=flops_per_token / flops_per_second * 1e3,
        per_square=flops_per_squared_token / flops_per_second * 1e3,
        blocks=blocks,
        encode_launch=8e9 / bytes_per_second * 1e3,
        encode_per_token=8e9 / flops_per_second * 1e3,
        decode_launch=1.0,
        decode_per_pixel=4 * FLOPS_PER_PIXEL / flops_per_second * 1e3,
    )


@dataclass(frozen=True)
class Sample:
    """A timed forward: the tokens of its branches, and milliseconds."""

    branches: tuple[int, ...]
    ms: float


def fit(samples: Sequence[Sample], prior: CostModel) -> CostModel:
    """Fit launch, per_token and per_square to timed forwards.

    Least squares of relative errors, with no coefficient below 0. Where the samples say nothing
    about a coefficient (fewer than three different packs), the prior's proportions hold.

    Raises:
        ValueError: there is no sample, or one took no time.
    """
    if not samples or any(not sample.ms > 0 for sample in samples):
        raise ValueError("sample times must be positive")
    if len({s.branches for s in samples}) < 3:
        return prior.scaled(
            sum(s.ms for s in samples) / sum(prior.step(s.branches) for s in samples)
        )
    rows = [
        [
            1 / s.ms,
            sum(s.branches) / s.ms,
            sum(branch * branch for branch in s.branches) / s.ms,
        ]
        for s in samples
    ]
    launch, per_token, per_square = _nonnegative_least_squares(rows)
    # What was measured holds the time of reading the weights already.
    return replace(prior, floor=0.0, launch=launch, per_token=per_token, per_square=per_square)


def fit_line(points: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """Offset and slope, neither below 0, of (x, ms) points; by relative errors.

    Raises:
        ValueError: fewer than two points, or one took no time.
    """
    if len(points) < 2 or any(not ms > 0 for _, ms in points):
        raise ValueError("at least two points that took time are needed")
    offset, slope = _nonnegative_least_squares([[1 / ms, x / ms] for x, ms in points])
    return offset, slope


def _nonnegative_least_squares(rows: list[list[float]]) -> list[float]:
    """x >= 0 that minimises |rows x - 1|."""
    # Imported here: the HTTP process estimates, and never fits.
    from scipy.optimize import nnls

    # Columns differ by ten orders of magnitude, and nnls takes what is below a tolerance for 0.
    scales = [math.sqrt(sum(row[i] ** 2 for row in rows)) or 1.0 for i in range(len(rows[0]))]
    scaled = [[value / scale for value, scale in zip(row, scales, strict=True)] for row in rows]
    solution, _ = nnls(scaled, [1.0] * len(rows), maxiter=1000)
    return [float(value) / scale for value, scale in zip(solution, scales, strict=True)]
