"""The formats that checkpoint files come in: those that are read, and those that are refused."""

from collections.abc import Iterable, Mapping

INSTEAD = "use a file in bf16, fp8_scaled, int8_convrot or GGUF Q8_0"
"""What a refusal ends with."""

FORMATS: Mapping[str, str] = {
    "safetensors in bf16, f16 or f32": "read",
    "fp8 without scales (e4m3, e5m2)": "read; matrices in e4m3 are taken as they are with "
    "`--quantization fp8`",
    "ComfyUI's fp8_scaled (e4m3), a scale for each matrix or row": "read; taken as it is with "
    "`--quantization fp8`, except outside the blocks. Scales of activations are checked and not "
    "used: tokens are quantised by their own",
    "fp8_scaled in e5m2": "read, through float32",
    "ComfyUI's int8, with or without rotation (int8_convrot)": "read; taken as it is with "
    "`--quantization int8`, each matrix with the rotation that it has, except outside the blocks; "
    "else through float32",
    "GGUF in Q8_0, F16, BF16 or F32, with the names of the safetensors file": "read; Q8_0 through "
    "float32",
    "GGUF in any other type (Q4_K, Q6_K, IQ4_XS, ...)": "refused by name: use Q8_0",
    "GGUF with llama.cpp's names (text encoders)": "refused by name: use the safetensors file",
    "mxfp8, nvfp4, fp8 with a scale for each block": "refused by name",
    "4 bits of any kind (svdquant, GPTQ, AWQ, bitsandbytes nf4, w4a4, w4a8)": "refused by name",
    "int8 without a scale, or without a marker that says whether it is rotated": "refused by name",
    "PyTorch pickles (.pt, .pth, .ckpt, .bin)": "refused by name: they can run code",
    "LoRA and other adapters": "refused by name: they go beside a model",
}
"""What is read and what happens to it, in the order of the documentation's table."""

PLAIN = ("BF16", "F16", "F32")
"""Safetensors' names of what is stored as numbers that mean themselves."""

FP8 = ("F8_E4M3", "F8_E5M2")

SMALL_FLOATS = {
    "F8_E8M0": "mxfp8",
    "F4": "a format of 4-bit floats",
    "F6_E2M3": "a format of 6-bit floats",
    "F6_E3M2": "a format of 6-bit floats",
    "U8": "a format that packs several numbers into a byte",
}
"""What tensors of these kinds belong to."""

_TRACES = {
    "bitsandbytes__nf4": "bitsandbytes nf4",
    "bitsandbytes__fp4": "bitsandbytes fp4",
    ".absmax": "bitsandbytes",
    ".SCB": "bitsandbytes int8",
    ".wscales": "svdquant (nunchaku)",
    ".smooth_factor": "svdquant (nunchaku)",
    ".qweight": "4 bits packed (svdquant, GPTQ or AWQ)",
    ".weight_scale_2": "nvfp4",
    ".weight_scale_inv": "fp8 with a scale for each block",
    ".weight_s_rel": "w4a8",
}
"""Ends of names that only tensors of a format have."""

_ADAPTERS = (".lora_", "lora_unet_", ".lokr_", ".hada_", ".dora_scale")
"""Pieces of names that only tensors of adapters have."""


def refused_format(keys: Iterable[str]) -> tuple[str, str] | None:
    """The name of a tensor that only a format has which is not read, and the format's name."""
    keys = list(keys)
    for end, name in _TRACES.items():
        for key in keys:
            if key.endswith(end):
                return key, name
    return None


def adapter_tensor(keys: Iterable[str]) -> str | None:
    """The name of a tensor that only adapters have."""
    return next((key for key in keys if any(piece in key for piece in _ADAPTERS)), None)
