"""How the model runs: settings that change time and memory, and with fp8 the pictures."""

from dataclasses import dataclass

from krea2_srt.errors import ConfigError

DTYPES = ("bfloat16", "float32")
"""What a model may be computed in where no SGLang decides it."""

_CHOICES = {
    "kernels": ("auto", "triton", "torch"),
    "products": ("auto", "torch", "sglang", "triton"),
    "fused_mlp": ("auto", "on", "off"),
    "cuda_graphs": ("auto", "on", "off"),
    "text_encoder": ("auto", "resident", "offload"),
}


@dataclass(frozen=True)
class RunnerConfig:
    """Fields, with their units and bounds. "auto" is the best that the device has.

    Attributes:
        attention: a back end of `krea2_srt.runner.attention`, or ``auto``.
        kernels: what runs between the matrix multiplications: ``triton`` or ``torch``.
        products: what multiplies in 8 bits: see `krea2_srt.runner.products`.
        fused_mlp: ``on``: SwiGLU is computed by the product before it, from `kernels`; ``off``: by
            a kernel of its own.
        cuda_graphs: ``on`` or ``off``; on a CPU there are none.
        max_graph_tokens: of a pack that is replayed; 0 is what memory allows.
        warm_up_s: seconds of the start that captures and the like may take; what is not captured
            then is when it comes.
        text_encoder: ``resident``, or ``offload``: in host memory between uses.
        gpu_memory_gib: that the model and its work may take; 0 is all that is free at the start.
    """

    attention: str = "auto"
    kernels: str = "auto"
    products: str = "auto"
    fused_mlp: str = "auto"
    cuda_graphs: str = "auto"
    max_graph_tokens: int = 0
    warm_up_s: float = 20.0
    text_encoder: str = "auto"
    gpu_memory_gib: float = 0.0

    def __post_init__(self) -> None:
        for name, choices in _CHOICES.items():
            if (value := getattr(self, name)) not in choices:
                raise ConfigError(f"{name}: must be one of {', '.join(choices)}, got {value!r}")
        for name in ("max_graph_tokens", "warm_up_s", "gpu_memory_gib"):
            if not 0 <= (value := getattr(self, name)) < float("inf"):
                raise ConfigError(f"{name}: must be 0 or greater, got {value}")
