"""Filling parameters from checkpoint files, one tensor at a time, strictly."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import torch
from torch import Tensor

from krea2_srt.errors import CheckpointError
from krea2_srt.kernels.quantize import QuantizedTokens, TokenFormat
from krea2_srt.model.json_files import read_json
from krea2_srt.model.stored.loaded import LoadedWeights
from krea2_srt.model.stored.tensor import StoredTensor
from krea2_srt.read_ahead import wait_for


@dataclass(frozen=True)
class WeightSlot:
    """Where one checkpoint tensor goes.

    Attributes:
        view: the (slice of a) parameter that receives it, on its final device.
        shape: shape the checkpoint must have, when it differs from the view's.
        transform: applied to the stored tensor before it is copied and cast into the view.
        store: puts the stored tensor in its place, where that is more than a copy.
        eight_bit: what the rows are stored in, where they are stored in 8 bits.
        take: puts rows that a checkpoint has in that format in their place as they are.
        rows_of: the fused matrix of which it is some rows; None if it is no matrix.
        start: the first of these rows.
    """

    view: Tensor
    shape: tuple[int, ...] | None = None
    transform: Callable[[Tensor], Tensor] | None = None
    store: Callable[[Tensor], None] | None = None
    eight_bit: TokenFormat | None = None
    take: Callable[[QuantizedTokens], None] | None = None
    rows_of: Tensor | None = None
    start: int = 0

    @property
    def stored_shape(self) -> tuple[int, ...]:
        return self.shape if self.shape is not None else tuple(self.view.shape)


class WeightDelta(Protocol):
    """What is added to a stored matrix for good, as an adapter is that is merged."""

    def added_to(self, stored: Tensor, format: TokenFormat | None) -> Tensor:
        """The sum, in float32 and on the stored matrix's device; that one is left alone.

        Args:
            stored: [out, in], in any float dtype.
            format: what the sum is quantised to; None where it is cast to the compute dtype.

        Raises:
            AdapterError: it is for a matrix of another shape.
        """


def checkpoint_files(path: Path, stem: str) -> list[Path]:
    """The weight files of one component: a single file, or the shards that an index names.

    Args:
        path: component folder, e.g. ``.../transformer``, or the component as a single file.
        stem: in a folder: file name without ending, e.g. ``diffusion_pytorch_model``.

    Raises:
        CheckpointError: nothing there, a broken index, or a shard that the index names is missing.
    """
    if path.is_file():
        return [path]
    index_file = path / f"{stem}.safetensors.index.json"
    if index_file.is_file():
        index = read_json(index_file)
        weight_map = index.get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"{index_file}: no weight_map in it")
        names = {str(name) for name in weight_map.values()}
        # A shard lies beside its index; anything else is a broken or hostile file.
        if odd := sorted(name for name in names if Path(name).name != name):
            raise CheckpointError(f"{index_file}: {odd[0]!r} is not a plain file name")
        files = [path / name for name in sorted(names)]
    else:
        files = [path / f"{stem}.safetensors"]
    for file in files:
        if not file.is_file():
            raise CheckpointError(f"weight file {file} is missing")
    return files


def check_weights(
    weight_map: Mapping[str, WeightSlot],
    shapes: Mapping[str, tuple[int, ...]],
    where: Path,
    ignore: Callable[[str], bool] = lambda name: False,
    written: Callable[[str], str] = str,
) -> None:
    """Check names and shapes before a byte of weights is read.

    Args:
        weight_map: what the model needs, by checkpoint name.
        shapes: what the checkpoint has.
        where: for the message.
        ignore: names that may be there without being needed.
        written: a tensor's name as the files have it, for the message.

    Raises:
        CheckpointError: naming the first missing, extra or misshapen tensors, with both shapes.
    """

    def some(names: list[str]) -> str:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(map(written, names[:3])) + more

    if missing := sorted(weight_map.keys() - shapes.keys()):
        raise CheckpointError(f"{where}: tensors are missing: {some(missing)}")
    if extra := sorted(n for n in shapes.keys() - weight_map.keys() if not ignore(n)):
        raise CheckpointError(f"{where}: unexpected tensors: {some(extra)}")
    for name, slot in weight_map.items():
        if shapes[name] != slot.stored_shape:
            raise CheckpointError(
                f"{where}: {written(name)} has shape {list(shapes[name])}, "
                f"expected {list(slot.stored_shape)}"
            )


def load_weights(
    stored: Mapping[str, StoredTensor],
    weight_map: Mapping[str, WeightSlot],
    deltas: Mapping[str, WeightDelta] = MappingProxyType({}),
    device: torch.device | None = None,
) -> LoadedWeights:
    """Copy tensors into ``weight_map``; call `check_weights` first.

    One after another, straight into their place on the device, so host memory peaks at one tensor
    above what the model itself takes; each once it has been read ahead, where that is under way.

    Args:
        stored: what open files have, by name; tensors without a slot are not read.
        weight_map: where each tensor goes.
        deltas: what is added to tensors before they are cast or quantised, by their names there.
        device: where sums and rows in 8 bits are computed, so that weights that stay on the host
            are those of the device to the bit; by default where they go.

    Returns:
        What became of them.
    """
    loaded = LoadedWeights()
    for name, source in stored.items():
        slot = weight_map.get(name)
        if slot is None:
            continue
        wait_for(source.extent.file, source.extent.end)
        if slot.take is not None and source.eight_bit == slot.eight_bit and name not in deltas:
            slot.take(source.read_eight_bit())
            loaded.taken(source)
            continue
        loaded.cast(source, slot.view.dtype)
        tensor = source.read()
        if name in deltas:
            where = device or slot.view.device
            tensor = deltas[name].added_to(tensor.to(where), slot.eight_bit)
        if slot.store is not None:
            stays = device is None or slot.view.device.type == device.type
            slot.store(tensor if stays else tensor.to(device))
            continue
        if slot.transform is not None:
            tensor = slot.transform(tensor)
        with torch.no_grad():
            slot.view.copy_(tensor.view(slot.view.shape))
    return loaded
