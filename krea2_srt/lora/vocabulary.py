"""Every trainer's name of every matrix, in one flat vocabulary.

Trainers take the names of Diffusers or those of the original code, join their parts by dots or by
underscores, and put prefixes before them. With underscores everywhere the names do not clash, so
one table reads them all.
"""

from collections.abc import Mapping

from krea2_srt.model.dit_files import original_name
from krea2_srt.model.matrices import Matrix

_PREFIXES = (
    "base_model.model.",
    "base_model_model_",
    "diffusion_model.",
    "diffusion_model_",
    "model.",
    "transformer.",
    "unet.",
    "lora_unet_",
    "lora_transformer_",
    "lycoris_",
)


class Vocabulary:
    """A model's matrices by every name that a trainer has for them.

    Args:
        matrices: by Diffusers name.
    """

    def __init__(self, matrices: Mapping[str, Matrix]) -> None:
        self._matrices: dict[str, Matrix] = {}
        for name, matrix in matrices.items():
            self._add(name, matrix)
            original = original_name(f"{name}.weight").removesuffix(".weight")
            if original != name:
                self._add(original, matrix)
            if name.endswith(".attn.to_q"):
                self._add(name + "kv", _qkv(name, matrices))

    def __len__(self) -> int:
        return len(self._matrices)

    def _add(self, name: str, matrix: Matrix) -> None:
        flat = _flat(name)
        assert flat not in self._matrices, f"two matrices are called {flat}"
        self._matrices[flat] = matrix

    def find(self, module: str) -> Matrix | None:
        """The matrix that a trainer's name is; None if the model has no such matrix."""
        while (matrix := self._matrices.get(_flat(module))) is None:
            prefix = next((prefix for prefix in _PREFIXES if module.startswith(prefix)), None)
            if prefix is None:
                return None
            module = module.removeprefix(prefix)
        return matrix


def _flat(name: str) -> str:
    return name.replace(".", "_")


def _qkv(to_q: str, matrices: Mapping[str, Matrix]) -> Matrix:
    """LyCORIS' name for queries, keys and values, whose rows follow one another here too."""
    parts = [matrices[to_q.removesuffix("q") + letter] for letter in "qkv"]
    rows = sum(part.shape[0] for part in parts)
    assert rows == parts[-1].stop - parts[0].start
    return Matrix(parts[0].linear, parts[0].start, (rows, parts[0].shape[1]))
