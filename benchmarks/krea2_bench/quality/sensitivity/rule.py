"""The rule by which matrices stay in 16 bits.

A matrix is a candidate if leaving it as it is takes away at least `LEAST_RATIO` times as large a
share of the squared error as it has of the bytes. Candidates are taken best first, while they have
at most `MOST_BYTES` of all bytes. They are kept if together they bring `LEAST_DB`, as measured with
just these in 16 bits; otherwise all matrices are quantised.

Each of the three has a reason. Bytes in 16 bits take twice the memory and twice the time of 8: 5 %
of the released model's are 0.6 GB, and 5 % of a step. 1 dB is a quarter of what lies between the
published fp8 and int8 versions of the model (23.6 and 27.7 dB). And what matters no more than its
size says would only make the list longer.
"""

from collections.abc import Sequence
from dataclasses import dataclass

MOST_BYTES = 0.05
LEAST_RATIO = 2.0
LEAST_DB = 1.0


@dataclass(frozen=True)
class MatrixError:
    """What a matrix does to the velocity.

    Attributes:
        name: as `--quantization-ignored-layers` takes it, such as ``27.ff.down``.
        size: share of the bytes of all matrices of the blocks.
        alone: mean squared relative error where only this one is quantised.
        others: the same where all but this one are.
        gain: share of the squared error of all quantised that goes away if this one is not; noise
            and errors that cancel each other can make it negative.
    """

    name: str
    size: float
    alone: float
    others: float
    gain: float

    @property
    def ratio(self) -> float:
        """Share of the error over share of the bytes: what keeping it brings for what it takes."""
        return self.gain / self.size


def candidates(matrices: Sequence[MatrixError]) -> list[str]:
    """Names of the matrices that would be kept, best first."""
    found, size = [], 0.0
    for matrix in sorted(matrices, key=lambda matrix: -matrix.ratio):
        if matrix.ratio >= LEAST_RATIO and size + matrix.size <= MOST_BYTES:
            found.append(matrix.name)
            size += matrix.size
    return found


def kept(names: Sequence[str], gain_db: float) -> list[str]:
    """Those of the candidates that stay in 16 bits: all, or none.

    Args:
        names: the candidates.
        gain_db: what all of them bring together.
    """
    return list(names) if gain_db >= LEAST_DB else []
