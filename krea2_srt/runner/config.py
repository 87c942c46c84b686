"""How the model runs: settings that change time and memory, and with fp8 the pictures."""

from dataclasses import dataclass

from krea2_srt.lora.scaled_files import scaled_files
from krea2_srt.setting import check_settings, setting

DTYPES = ("bfloat16", "float32")
"""What a model may be computed in where no SGLang decides it."""

ATTENTION_BACKENDS = (
    "sdpa",
    "torch_varlen",
    "torch_varlen_repeated",
    "cudnn",
    "cudnn_repeated",
    "triton_gated",
    "fa3",
    "fa3_fp8",
    "fa4",
)
"""All that `krea2_srt.runner.attention_backends` knows, installed or not."""


@dataclass(frozen=True)
class RunnerConfig:
    """The model runner's settings, each of which says what it is for. "auto" is the best that the
    device has.
    """

    attention: str = setting(
        "auto",
        "attention back end; a name is taken without a race, and fa3_fp8 generates other pictures",
        choices=("auto", *ATTENTION_BACKENDS),
    )
    kernels: str = setting(
        "auto",
        "kernels between the matrix multiplications; torch has the references of Triton's",
        choices=("auto", "triton", "torch"),
    )
    products: str = setting(
        "auto",
        "what multiplies in 8 bits; a name is taken without a race; sglang needs sglang-kernel, "
        "and sglang_convrot (int8, in SGLang) nvcc, which compiles it once per machine",
        choices=("auto", "torch", "sglang", "sglang_convrot", "triton"),
    )
    fused_mlp: str = setting(
        "auto",
        "SwiGLU at the end of the product before it; auto is off on a CPU and with kernels torch",
        choices=("auto", "on", "off"),
    )
    cuda_graphs: str = setting(
        "auto",
        "CUDA graphs; on refuses to start without them, and takes them without a race",
        choices=("auto", "on", "off"),
    )
    max_graph_tokens: int = setting(
        0,
        "most tokens in a pack that is replayed, without a race; 0 is what a turn and memory allow",
        least=0,
    )
    warm_up_s: float = setting(
        20.0,
        "seconds of the start for captures and first pictures; sglang generate and krea2-generate "
        "take none",
        least=0,
    )
    text_encoder: str = setting(
        "auto",
        "where the text encoder is between uses, offload is host memory; SGLang's "
        "--text-encoder-cpu-offload says the same",
        choices=("auto", "resident", "offload"),
    )
    recipe: str = setting(
        "auto",
        "sampled as Turbo or as Raw; auto is what the checkpoint says of itself; see "
        "docs/checkpoints.md",
        choices=("auto", "turbo", "raw"),
    )
    lora_merge: str = setting(
        "",
        "adapters that are added to the weights at the start, for all images: FILE or FILE:SCALE, "
        "several separated by commas; see docs/lora.md",
    )
    lora_dir: str = setting(
        "",
        "folder of the adapters that requests may name; see docs/lora.md",
    )
    lora_any_path: str = setting(
        "off",
        "whether SGLang's /v1/set_lora may name files outside of that folder",
        choices=("off", "on"),
    )
    lora_memory_gib: float = setting(
        2.0,
        "GiB of the device for adapters; all of the images that are begun fit into it; with "
        "LORA_DIR at most as much again for CUDA graphs with adapters",
        above=0,
    )
    lora_host_gib: float = setting(
        4.0, "GiB of host memory for adapters that are not on the device", least=0
    )
    gpu_memory_gib: float = setting(
        0.0, "GiB of the GPU to take; 0 is all that is free at the start", least=0
    )

    def __post_init__(self) -> None:
        check_settings(self)
        scaled_files("lora_merge", self.lora_merge)
