"""Which of SGLang's options our runner honours. All others are left to SGLang's own Krea 2.

A list of what is known to work, not of what is known not to: an option that SGLang adds tomorrow
is then handed to SGLang instead of being ignored.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

from sglang.multimodal_gen import envs

from krea2_srt.errors import ConfigError
from krea2_srt.model.parts import PARTS
from krea2_srt.model.quantization import (
    SERVED,
    SGLANG_NAMES,
    Quantization,
    our_name,
    sglang_quantization,
)
from krea2_srt.model.releases import CLASS_NAME
from krea2_srt.sglang.compat import explicit_options

# Options of the process, the channel and the output, which SGLang handles around any pipeline.
_AROUND_THE_PIPELINE = """
    base_gpu_id backend batching_config batching_delay_ms batching_max_size batching_mode config
    dist_timeout dp_size
    enable_batching_metrics enable_cache_report enable_metrics gpu_ids host
    http_graceful_shutdown_timeout input_save_path log_level log_requests log_requests_format
    log_requests_level log_requests_target master_port model_id model_path
    nccl_port num_gpus numa_node output_path perf_dump_path
    pin_cpu_memory port prompt_file_path revision scheduler_port
    scheduler_ports scheduler_rpc_timeout served_model_name sleep_on_idle strict_ports
    text_encoder_configs uvicorn_access_log_exclude_prefixes warmup_mode
    warmup_num_frames warmup_resolutions warmup_steps warmup_sampling_params webui webui_port
    async_output_save output_file_path
"""

# Options that the runner itself reads.
_READ_BY_THE_RUNNER = """
    conditioning_cache_max_size_mb disable_conditioning_cache dit_precision
    quantization quantization_ignored_layers text_encoder_cpu_offload text_encoder_precisions
    transformer_weights_path vae_decode_precision vae_precision vae_tiling
"""

# Options of an adapter, which change nothing by themselves. Ours is merged in every mode.
_OF_AN_ADAPTER = """
    lora_alpha lora_merge_mode lora_nickname lora_path lora_scale lora_weight_name
"""

# Request fields, which `sglang generate` takes on its command line too. Quality chooses how much
# SGLang may approximate: ours never does.
_REQUEST_FIELDS = """
    debug enable_upscaling guidance_scale height negative_prompt no_override_protected_fields
    num_inference_steps num_outputs_per_prompt num_profiled_timesteps output_compression
    output_file_name output_path output_quality perf_dump_path profile profile_all_stages prompt
    prompt_path quality return_file_paths_only return_frames return_image_bytes save_output seed
    suppress_logs upscaling_model_path upscaling_scale width
"""

HONOURED_FIELDS = frozenset(_REQUEST_FIELDS.split())
HONOURED = HONOURED_FIELDS | frozenset((_AROUND_THE_PIPELINE + _READ_BY_THE_RUNNER).split())

_ENVIRONMENT = {"SGLANG_CACHE_DIT_ENABLED": False, "SGLANG_DIFFUSION_CFG_GATE_STEP": 1.0}
"""Environment variables that change what SGLang's own denoising stage computes, when not this."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "nnodes": (1,),
    "node_rank": (0,),
    "tp_size": (None, 1),
    "sp_degree": (None, 1),
    "ulysses_degree": (None, 1),
    "ring_degree": (None, 1),
    "cfg_parallel_degree": (None, 1),
    "pipeline_class_name": (None, CLASS_NAME),
    "performance_mode": ("auto", "speed", "manual"),
}


def unsupported_options(server_args: Any) -> list[str]:
    """Names of the options given to SGLang that our runner would have to ignore.

    Args:
        server_args: SGLang's diffusion ``ServerArgs``.

    Returns:
        Sorted flag names, ``--like-this``, and environment variables; empty when we can serve.
    """
    found = {f"--{name.replace('_', '-')}" for name in _explicit_and_not_neutral(server_args)}
    # One process per GPU is all we do: more GPUs than replicas means that a model is split.
    if server_args.num_gpus not in (1, server_args.dp_size or 1):
        found.add("--num-gpus")
    if getattr(server_args.disagg_role, "value", "monolithic") != "monolithic":
        found.add("--disagg-role")
    if server_args.comfyui_mode:
        found.add("--comfyui-mode")
    if server_args.quantization and our_name(server_args.quantization) not in SERVED:
        found.add("--quantization")
    found |= {
        name for name, off in _ENVIRONMENT.items() if getattr(envs, name, None) not in (None, off)
    }
    return sorted(found)


def mark_as_server(server_args: Any) -> None:
    """Say that the process serves, though not by `sglang serve`."""
    server_args.krea2_serves = True


def is_server(server_args: Any) -> bool:
    """Whether requests will come, or this is one command that generates once and ends.

    `sglang serve` warms up by SGLang's own default, `sglang generate` does not.
    """
    return server_args.warmup_mode == "server" or getattr(server_args, "krea2_serves", False)


def quantization_of(server_args: Any) -> Quantization | None:
    """What ``--quantization`` and ``--quantization-ignored-layers`` ask for."""
    if not server_args.quantization:
        return None
    return sglang_quantization(
        server_args.quantization, server_args.quantization_ignored_layers or ()
    )


def check_quantization_of_sglang(server_args: Any, options: Sequence[str]) -> None:
    """Check that SGLang's own Krea 2 knows the quantization by the name that was given.

    Args:
        options: that only SGLang honours.

    Raises:
        ConfigError: it has another.
    """
    for theirs, ours in SGLANG_NAMES.items():
        if server_args.quantization == ours:
            raise ConfigError(
                f"--quantization: SGLang's own Krea 2, which {', '.join(options)} would need, "
                f"does not know {ours}; its own is called {theirs}"
            )


def _explicit_and_not_neutral(server_args: Any) -> Iterable[str]:
    defaults = {
        f.name: f.default if f.default is not dataclasses.MISSING else None
        for f in dataclasses.fields(server_args)
    }
    honoured = HONOURED
    if server_args.lora_path:
        honoured |= frozenset(_OF_AN_ADAPTER.split())
    for name in ("component_paths", "component_weights_paths"):
        if getattr(server_args, name).keys() <= set(PARTS):
            honoured |= {name}
    for name in explicit_options(server_args) - honoured:
        value = getattr(server_args, name, None)
        neutral = _NEUTRAL.get(name, (defaults.get(name), False, None))
        # An unknown name has no value here (a request field, say): it was given, so it counts.
        if hasattr(server_args, name) and value in neutral:
            continue
        yield name
