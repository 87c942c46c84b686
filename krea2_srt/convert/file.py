"""The DiT alone, as one file with the original release's names, as ComfyUI has it."""

import json

from krea2_srt.convert.conversion import ORIGINAL, conversions
from krea2_srt.convert.plan import Plan, Shard
from krea2_srt.model.checkpoint import SamplingDefaults
from krea2_srt.model.dit_files import StoredDiT
from krea2_srt.model.part_files import CONFIG
from krea2_srt.model.quantization import Quantization
from krea2_srt.model.released import transformer_config


def file_plan(
    stored: StoredDiT, sampling: SamplingDefaults, quantization: Quantization | None
) -> Plan:
    """A single file.

    Args:
        stored: the DiT.
        sampling: Turbo's or Raw's, which the file's metadata says.
        quantization: of the DiT.
    """
    config = transformer_config(stored.config) | {"is_distilled": sampling.distilled}
    metadata = {
        "format": "pt",
        "modelspec.architecture": "krea-2",
        "modelspec.title": f"Krea 2 {'Turbo' if sampling.distilled else 'Raw'}",
        # What leaves no trace in the tensors' shapes, too.
        CONFIG: json.dumps(config),
    }
    shard = Shard("", tuple(conversions(stored, quantization, ORIGINAL)), metadata)
    return Plan("", (shard,), {}, {})
