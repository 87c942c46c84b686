"""A Krea 2 checkpoint on disk: where its parts lie and which sampling it was trained for."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from krea2_srt.errors import CheckpointError
from krea2_srt.model.latents import PATCH
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.model.schedule import TURBO_MU, ResolutionShift, Schedule, flow_schedule
from krea2_srt.model.text_encoder import DEFAULT_SELECT_LAYERS
from krea2_srt.model.weights import read_json
from krea2_srt.request import MU_RANGE, SIZE_MULTIPLE

TRAINED_SIDE = "_trained_side"
"""In ``model_index.json``: our own, for checkpoints that are smaller than Krea 2. Diffusers and
SGLang pass over names like this.
"""
_SCHEDULER = "scheduler/scheduler_config.json"


@dataclass(frozen=True)
class SamplingDefaults:
    """How a checkpoint wants to be sampled.

    Attributes:
        distilled: Turbo (True) or Raw (False).
        shift: Raw's timestep shift.
        trained_side: pixels of the longest side that it was trained on.
    """

    distilled: bool
    shift: ResolutionShift = field(default_factory=ResolutionShift)
    trained_side: int = 2048

    @property
    def default_steps(self) -> int:
        return 8 if self.distilled else 52

    @property
    def default_guidance(self) -> float:
        return 0.0 if self.distilled else 3.5

    @property
    def default_side(self) -> int:
        return min(1024, self.trained_side)

    def with_shift(self, min_mu: float | None, max_mu: float | None) -> "SamplingDefaults":
        """The same with other end points of Raw's shift, where given."""
        return replace(
            self,
            shift=replace(
                self.shift,
                min_mu=self.shift.min_mu if min_mu is None else min_mu,
                max_mu=self.shift.max_mu if max_mu is None else max_mu,
            ),
        )

    def schedule(self, steps: int, image_tokens: int, mu: float | None = None) -> Schedule:
        """Sigmas for an image; ``mu`` overrides the checkpoint's own shift."""
        if mu is None:
            mu = TURBO_MU if self.distilled else self.shift.mu(image_tokens)
        return flow_schedule(steps, mu)


@dataclass(frozen=True)
class Krea2Checkpoint:
    """Paths of all parts, with what ``model_index.json`` says of them.

    Attributes:
        transformer: ``transformer/`` folder or original single file.
        text_encoder, tokenizer, vae: folders.
        select_layers: text encoder hidden states that the DiT reads.
        sampling: Turbo's or Raw's.
    """

    transformer: Path
    text_encoder: Path
    tokenizer: Path
    vae: Path
    sampling: SamplingDefaults
    select_layers: tuple[int, ...] = DEFAULT_SELECT_LAYERS

    @classmethod
    def from_folder(cls, folder: Path) -> "Krea2Checkpoint":
        """Read the released (Diffusers) layout.

        Raises:
            CheckpointError: the folder, a part of it or the right class name is missing.
        """
        if not folder.is_dir():
            raise CheckpointError(f"checkpoint folder {folder} does not exist")
        index_file = folder / "model_index.json"
        index: dict[str, Any] = read_json(index_file)
        if index.get("_class_name") != CLASS_NAME:
            raise CheckpointError(
                f"{index_file}: _class_name is {index.get('_class_name')!r}, "
                f"expected {CLASS_NAME!r}"
            )
        if index.get("patch_size", PATCH) != PATCH:
            raise CheckpointError(f"{index_file}: patch_size must be {PATCH}")
        select_layers = index.get("text_encoder_select_layers") or DEFAULT_SELECT_LAYERS
        if not isinstance(select_layers, (list, tuple)) or not all(
            type(t) is int and t >= 0 for t in select_layers
        ):
            raise CheckpointError(
                f"{index_file}: text_encoder_select_layers must be layer numbers, "
                f"got {select_layers!r}"
            )
        side = index.get(TRAINED_SIDE, SamplingDefaults.trained_side)
        if type(side) is not int or side < SIZE_MULTIPLE or side % SIZE_MULTIPLE:
            raise CheckpointError(
                f"{index_file}: {TRAINED_SIDE} must be a multiple of {SIZE_MULTIPLE}, got {side!r}"
            )
        parts = {}
        for part in ("transformer", "text_encoder", "tokenizer", "vae", "scheduler"):
            if not (folder / part).is_dir():
                raise CheckpointError(f"checkpoint folder {folder} has no {part}/")
            parts[part] = folder / part
        scheduler = read_json(parts.pop("scheduler") / "scheduler_config.json")
        return cls(
            **parts,
            sampling=SamplingDefaults(
                bool(index.get("is_distilled", False)), _shift(scheduler), side
            ),
            select_layers=tuple(select_layers),
        )


def _shift(scheduler: dict[str, Any]) -> ResolutionShift:
    for name, expected in (("use_dynamic_shifting", True), ("time_shift_type", "exponential")):
        if scheduler.get(name, expected) != expected:
            raise CheckpointError(
                f"{_SCHEDULER}: {name} is {scheduler[name]!r}, Krea 2 needs {expected!r}"
            )
    default = ResolutionShift()
    values = [
        scheduler.get("base_image_seq_len", default.min_tokens),
        scheduler.get("max_image_seq_len", default.max_tokens),
        scheduler.get("base_shift", default.min_mu),
        scheduler.get("max_shift", default.max_mu),
    ]
    numbers = all(isinstance(v, (int, float)) and abs(v) < 1e9 for v in values)
    if not numbers or not 0 <= values[0] < values[1] or max(map(abs, values[2:])) > MU_RANGE[1]:
        raise CheckpointError(f"{_SCHEDULER}: impossible timestep shift {values}")
    return ResolutionShift(int(values[0]), int(values[1]), float(values[2]), float(values[3]))
