"""From a checkpoint to another one."""

from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from krea2_srt.convert.atomic import check_new, check_space, whole_or_nothing
from krea2_srt.convert.file import file_plan
from krea2_srt.convert.folder import SHARD_BYTES, folder_plan
from krea2_srt.convert.losses import Loss
from krea2_srt.convert.plan import OnProgress, Plan
from krea2_srt.model.checkpoint import Krea2Checkpoint, SamplingDefaults
from krea2_srt.model.dit_files import StoredDiT, open_dit
from krea2_srt.model.quantization import Quantization


@dataclass(frozen=True)
class Converted:
    """What was written, and what it lost.

    Attributes:
        out: the folder or file.
        bytes_before, bytes_after: of the DiT's weights.
        tensors: how many of the DiT's were kept as they were, quantised, taken over in 8 bits, or
            dequantised, in these words.
        losses: errors of those that were rounded, by kind.
        left_behind: what the input had beside a checkpoint's parts.
    """

    out: Path
    bytes_before: int
    bytes_after: int
    tensors: Mapping[str, int]
    losses: tuple[Loss, ...]
    left_behind: tuple[str, ...]


def no_progress(done: int, total: int) -> None:
    """Tells nobody."""


def convert_to_folder(
    checkpoint: Krea2Checkpoint,
    out: Path,
    quantization: Quantization | None = None,
    on_progress: OnProgress = no_progress,
    shard_bytes: int = SHARD_BYTES,
) -> Converted:
    """Write a checkpoint as a folder in the released layout.

    Tensors go one by one, so it takes little memory above that of the largest of them. The folder
    appears when all of it is on the disk and was read back from there.

    Args:
        checkpoint: what is converted.
        out: the folder; nothing may have its name yet.
        quantization: of the DiT's matrices; None writes numbers as they are stored.
        on_progress: see `OnProgress`.
        shard_bytes: size of a weight file, at most.

    Raises:
        CheckpointError: the checkpoint cannot be read.
        ConfigError: the quantization does not fit the model, or no file can have it.
        OSError: the folder cannot be written, there is no room for it, or it exists.
    """

    def plan(stored: StoredDiT, stack: ExitStack) -> Plan:
        return folder_plan(checkpoint, stored, quantization, stack, shard_bytes)

    return _convert(checkpoint.transformer, out, plan, on_progress)


def convert_to_file(
    transformer: Path,
    sampling: SamplingDefaults,
    out: Path,
    quantization: Quantization | None = None,
    on_progress: OnProgress = no_progress,
) -> Converted:
    """Write a DiT, without the other parts, as one file with the original names.

    Args:
        transformer: what is converted; see `krea2_srt.model.dit_files.load_dit`.
        sampling: Turbo's or Raw's; the file says it.
        out, quantization, on_progress: see `convert_to_folder`.

    Raises:
        CheckpointError, ConfigError, OSError: see `convert_to_folder`.
    """

    def plan(stored: StoredDiT, stack: ExitStack) -> Plan:
        return file_plan(stored, sampling, quantization)

    return _convert(transformer, out, plan, on_progress)


def _convert(
    transformer: Path,
    out: Path,
    make_plan: Callable[[StoredDiT, ExitStack], Plan],
    on_progress: OnProgress,
) -> Converted:
    check_new(out)
    with ExitStack() as stack:
        stored = stack.enter_context(open_dit(transformer))
        plan = make_plan(stored, stack)
        check_space(out, plan.nbytes)
        with whole_or_nothing(out) as work:
            losses = plan.write(work, on_progress)
        of_dit = [shard for shard in plan.shards if shard.name.startswith(plan.transformer)]
        return Converted(
            out,
            sum(file.stat().st_size for file in stored.files),
            sum((out / shard.name).stat().st_size for shard in of_dit),
            Counter(conversion.how for shard in of_dit for conversion in shard.conversions),
            tuple(losses),
            plan.left_behind,
        )
