"""Reading an adapter, strictly: one key that is not understood, and the file is refused.

Other readers pass over what they do not know and draw the base model's picture.
"""

from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

from krea2_srt.errors import AdapterError
from krea2_srt.lora.adapter import Adapter, Factor
from krea2_srt.lora.factors import read_factor
from krea2_srt.lora.files import AdapterFiles, UnreadableError, open_weights, unreadable
from krea2_srt.lora.keys import shown, split_key
from krea2_srt.lora.limits import DEFAULT_LIMITS, Limits
from krea2_srt.lora.peft_config import PeftConfig, config_in_metadata, config_of_folder
from krea2_srt.lora.stored import StoredModule
from krea2_srt.lora.vocabulary import Vocabulary
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.matrices import Matrix, dit_matrices


def read_adapter(
    path: Path,
    config: Krea2Config,
    limits: Limits = DEFAULT_LIMITS,
    alpha: float | None = None,
    called: str = "",
) -> Adapter:
    """Read an adapter.

    Args:
        path: a ``.safetensors`` file of any common trainer, or a folder of PEFT's.
        config: the model that it has to fit.
        limits: how large it may be.
        alpha: of a LoRA whose files do not say theirs; None is the rank.
        called: its name, and what errors call it in place of the path.

    Raises:
        AdapterError: it is missing, too large, damaged, another model's, or has anything in it
            that is not understood; one line that names the file and the key.
    """
    label = called or shown(str(path))
    try:
        files = AdapterFiles.at(path)
        stamp = files.stamp()
        peft = config_of_folder(files.config, limits) if files.config else None
        with open_weights(files.weights, limits) as tensors:
            matrices = _read(tensors, dit_matrices(config), peft, limits, alpha)
        digest = files.digest()
        if files.stamp() != stamp:
            raise UnreadableError("it was replaced while it was read")
    except AdapterError as error:
        raise type(error)(f"adapter {label}: {error}") from None
    except OSError as error:
        raise UnreadableError(f"adapter {label}: {unreadable(error)}") from None
    return Adapter(called or (path.stem if path.is_file() else path.name), digest, matrices)


def _read(
    tensors: Any,
    matrices: Mapping[str, Matrix],
    peft: PeftConfig | None,
    limits: Limits,
    alpha: float | None,
) -> dict[str, tuple[Factor, ...]]:
    modules = _modules(tensors, Vocabulary(matrices))
    if peft is None:
        peft = config_in_metadata(tensors.metadata() or {}, limits)
    found: dict[str, list[Factor]] = {}
    for module in modules:
        found.setdefault(module.matrix.linear, []).append(read_factor(module, peft, limits, alpha))
    if not any(factor.up.any() and factor.down.any() for some in found.values() for factor in some):
        raise AdapterError("it changes nothing: all of its factors are zero")
    return {linear: tuple(factors) for linear, factors in found.items()}


def _modules(tensors: Any, vocabulary: Vocabulary) -> list[StoredModule]:
    """All of a file's, sorted by `Linear` and row; none overlaps another."""
    modules: dict[Matrix, StoredModule] = {}
    for key in sorted(tensors.keys()):
        name, role = split_key(key)
        matrix = vocabulary.find(name)
        if matrix is None:
            raise AdapterError(f"{shown(key)} is of no matrix of this model")
        module = modules.setdefault(matrix, StoredModule(tensors, matrix, name))
        if module.name != name:
            raise AdapterError(f"{module.key()} and {shown(key)} are two names of one matrix")
        module.add(role, key)
    if not modules:
        raise AdapterError("there is no tensor in it")
    in_order = sorted(modules.values(), key=lambda m: (m.matrix.linear, m.matrix.start))
    for one, other in pairwise(in_order):
        same = one.matrix.linear == other.matrix.linear
        if same and one.matrix.stop > other.matrix.start:
            raise AdapterError(f"{one.key()} and {other.key()} are of the same rows of a matrix")
    return in_order
