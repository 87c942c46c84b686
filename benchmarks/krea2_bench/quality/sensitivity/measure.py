"""Errors of the velocity with any set of matrices in 8 bits.

All is computed in float32 but the 8-bit matrices: of a model in bf16 every change, however small,
rounds otherwise from there on, and that alone is more than what one matrix in int8 does.
"""

import time
from collections.abc import Callable, Collection, Iterable, Sequence

import torch
from torch import Tensor, nn

from krea2_bench.quality.cases import Case, CaseError
from krea2_bench.quality.sensitivity.rule import MatrixError
from krea2_srt.engine.config import EngineConfig
from krea2_srt.kernels.products import scaled_product
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.layers import Linear
from krea2_srt.model.quantization import (
    MATRICES,
    Quantization,
    QuantizedLinear,
    block_linears,
)
from krea2_srt.request import ImageRequest
from krea2_srt.runner.generation import Generation
from krea2_srt.runner.model_runner import Krea2Runner


class Matrices:
    """The matrices of a DiT's blocks, which can be as they were loaded or in 8 bits.

    Args:
        dit: whose; it is changed.
        quantization: of those in 8 bits. They take their memory at once, beside the others.

    Attributes:
        sizes: share of the bytes of each, by name.
    """

    @torch.inference_mode()
    def __init__(self, dit: Krea2DiT, quantization: Quantization) -> None:
        self._dit = dit
        self._plain = {
            f"{number}.{name}": _matrix(block, name)
            for number, block in enumerate(dit.blocks)
            for name in MATRICES
        }
        self._quantized = {
            name: _quantized(name, plain, quantization) for name, plain in self._plain.items()
        }
        counts = {name: plain.weight.numel() for name, plain in self._plain.items()}
        self.sizes = {name: count / sum(counts.values()) for name, count in counts.items()}

    def quantize(self, names: Collection[str]) -> None:
        """Have just these in 8 bits from now on."""
        for name, plain in self._plain.items():
            number, _, place = name.partition(".")
            linear = self._quantized[name] if name in names else plain
            self._dit.blocks[int(number)].set_submodule(place, linear)


def _matrix(block: nn.Module, name: str) -> Linear:
    found = block.get_submodule(name)
    assert isinstance(found, Linear)
    return found


def _quantized(name: str, plain: Linear, quantization: Quantization) -> Linear:
    number, _, place = name.partition(".")
    with torch.device(plain.weight.device):
        make = block_linears(quantization, int(number), plain.dtype)
        made = make(place, plain.weight.shape[1], plain.parts)
    assert isinstance(made, QuantizedLinear)
    # The fast ones return bf16 only.
    made.product = scaled_product
    rows = plain.weight.split(list(plain.parts.values()))
    for (_, slot), part in zip(made.weight_map(""), rows, strict=True):
        assert slot.store is not None
        slot.store(part)
    return made


class VelocityErrors:
    """Errors of the velocity on the way from noise to picture of the model as it was loaded.

    Args:
        runner: loaded in float32.
        cases: what is generated, in packs.

    Attributes:
        runner: the same.
        num_steps: of a picture.
        steps: those at which errors are taken; all of them at first.
    """

    def __init__(self, runner: Krea2Runner, cases: Sequence[Case]) -> None:
        requests = [
            ImageRequest(c.prompt, c.width, c.height, c.steps, c.guidance, seed=c.seed)
            for c in cases
        ]
        self.runner = runner
        self._generation = Generation(runner, requests, previews=True)  # keeps velocities
        self._max_tokens = EngineConfig().max_pack_tokens
        self._tokens: list[list[Tensor]] = []
        self._velocities: list[list[Tensor]] = []
        states = self._generation.states
        self.num_steps = cases[0].steps
        for step in range(self.num_steps):
            tokens = [state.tokens for state in states if state.tokens is not None]
            self._tokens.append(tokens)
            self._velocities.append(self._velocity(step))
        self.steps: Sequence[int] = range(self.num_steps)

    def mean_square(self) -> float:
        """Mean over images and `steps` of the squared relative error of the velocity."""
        errors = [
            ((got - expected).double().norm() / expected.double().norm()).square().item()
            for step in self.steps
            for got, expected in zip(self._velocity(step), self._velocities[step], strict=True)
        ]
        return sum(errors) / len(errors)

    def _velocity(self, step: int) -> list[Tensor]:
        """What the model as it is now makes of the latents before a step."""
        for state, tokens in zip(self._generation.states, self._tokens[step], strict=True):
            state.tokens, state.sequence.step = tokens, step
        for pack in self._generation.packs(self._max_tokens):
            self._generation.step(pack)
        return [state.velocity for state in self._generation.states if state.velocity is not None]


def steps_within(budget_s: float, seconds_per_step: float, steps: int) -> list[int]:
    """As many of the steps as there is time for, evenly spread.

    Args:
        budget_s: seconds that there are; what came before may have taken more than all.
        seconds_per_step: that all measurements take at one step.
        steps: of a picture.

    Raises:
        CaseError: there is not even time for one.
    """
    affordable = min(steps, int(budget_s / seconds_per_step))
    if affordable < 1:
        raise CaseError(
            f"--budget-s: one step takes about {seconds_per_step:.2g} s, and "
            f"{max(0.0, budget_s):.2g} s are left; give more, or fewer prompts by --count or "
            f"--prompts, or a smaller --size"
        )
    return [int((number + 0.5) * steps / affordable) for number in range(affordable)]


def measure(
    errors: VelocityErrors,
    matrices: Matrices,
    budget_s: float,
    say: Callable[[str], None],
    watch: Callable[[Sequence[str]], Iterable[str]] = list,
) -> tuple[float, list[MatrixError]]:
    """The squared error of all quantised, and each matrix's.

    Args:
        errors: `steps` is set to those that there is time for.
        matrices: of the same model.
        budget_s: about how many seconds to take.
        say: is told how long it will take.
        watch: passes the names of the matrices through as they come, for a progress bar.
    """
    names = list(matrices.sizes)
    errors.steps = [errors.num_steps // 2]
    matrices.quantize(names)
    errors.mean_square()  # whatever the first time takes longer
    start = time.perf_counter()
    errors.mean_square()
    seconds = time.perf_counter() - start
    # All, each alone, all but each, and what is kept.
    forwards = 2 * len(names) + 2
    errors.steps = steps_within(budget_s, forwards * seconds, errors.num_steps)
    say(
        f"{len(names)} matrices, {len(errors.steps)} of {errors.num_steps} steps: about "
        f"{forwards * len(errors.steps) * seconds:.0f} s"
    )
    whole = errors.mean_square()
    found: list[MatrixError] = []
    for name in watch(names):
        matrices.quantize([name])
        alone = errors.mean_square()
        matrices.quantize([other for other in names if other != name])
        others = errors.mean_square()
        found.append(MatrixError(name, matrices.sizes[name], alone, others, 1 - others / whole))
    return whole, found


def without(errors: VelocityErrors, matrices: Matrices, kept: Collection[str]) -> float:
    """The squared error of all quantised but these."""
    matrices.quantize([name for name in matrices.sizes if name not in kept])
    return errors.mean_square()
