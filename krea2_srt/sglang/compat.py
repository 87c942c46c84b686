"""SGLang's insides that we rely on: what a new release of SGLang may change, in one file.

SGLang promises its plugins a registry and hooks. All that is named here lies behind them: the
targets of our hooks, the methods that our classes override or call, and names with an underscore
of other objects, which the rest of this package reaches through these functions alone. A test holds
`SIGNATURES` and `ATTRIBUTES` to the installed SGLang, and finds uses that are not in them.
"""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

RUNTIME = "sglang.multimodal_gen.runtime"

SCHEDULER = f"{RUNTIME}.managers.scheduler.Scheduler"
WORKER = f"{RUNTIME}.managers.gpu_worker.GPUWorker"
PIPELINE = f"{RUNTIME}.pipelines_core.composed_pipeline_base.ComposedPipelineBase"
STAGE = f"{RUNTIME}.pipelines_core.stages.base.PipelineStage"

MODEL_INDEX = f"{RUNTIME}.utils.hf_diffusers_utils.maybe_download_model_index"
CREATE_APP = f"{RUNTIME}.entrypoints.http_server.create_app"
LAUNCH_HTTP = f"{RUNTIME}.launch_server.launch_http_server_only"
LAUNCH = f"{RUNTIME}.launch_server.launch_server"
GENERATE = f"{RUNTIME}.entrypoints.diffusion_generator.DiffGenerator.generate"
"""The targets of hooks, with `SCHEDULER`."""

SIGNATURES = {
    f"{SCHEDULER}.__init__": "self, server_args, gpu_id, port_args, local_rank",
    f"{SCHEDULER}._dispatch_single_request": "self, req_or_group",
    f"{SCHEDULER}._reap_finalizes": "self",
    f"{SCHEDULER}._return_item_result": "self, item, output_batch",
    f"{SCHEDULER}._wait_idle": "self, timeout_s",
    f"{SCHEDULER}.event_loop": "self",
    f"{SCHEDULER}.process_received_reqs_with_req_based_warmup": "self, recv_reqs",
    f"{SCHEDULER}.recv_reqs": "self",
    f"{WORKER}.release_cache_if_idle": "self",
    f"{WORKER}.is_sleeping": "self",
    f"{WORKER}.execute_forward": "self, batch, return_req, defer_finalize",
    f"{WORKER}._finalize_output_batch": (
        "self, output_batch, req, save_output_paths, output_metrics, deferred"
    ),
    f"{WORKER}._iter_output_metrics": "output_batch",
    f"{WORKER}._merge_expanded_output_batches": "output_batches",
    f"{WORKER}._save_group_output_paths": "self, reqs, output_batch",
    f"{WORKER}._save_output_paths": "self, req, output_batch",
    f"{WORKER}._validate_group_forward_reqs": "reqs",
    f"{PIPELINE}.__init__": (
        "self, model_path, server_args, required_config_modules, loaded_modules, executor"
    ),
    f"{PIPELINE}.add_stage": "self, stage, stage_name",
    f"{PIPELINE}.create_pipeline_stages": "self, server_args",
    f"{PIPELINE}.load_modules": "self, server_args, loaded_modules",
    f"{STAGE}.__init__": "self",
    f"{STAGE}.forward": "self, batch, server_args",
    f"{STAGE}.progress_bar": "self, iterable, total, disable, batch, kwargs",
    f"{STAGE}.role_affinity": "self",
    MODEL_INDEX: "model_name_or_path",
    CREATE_APP: "server_args, worker_pids, disagg_server",
    LAUNCH_HTTP: "server_args, worker_pids, disagg_server",
    LAUNCH: "server_args, launch_http_server",
    GENERATE: "self, sampling_params_kwargs, external_trace_header",
    "sglang.kernels.ops.attention.flash_attention.flash_attn_varlen_func": (
        "q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, q_descale, "
        "k_descale, v_descale, ver, ..."
    ),
    "sglang.multimodal_gen.registry.register_pipeline": (
        "pipeline_cls, sampling_param_cls, pipeline_config_cls, hf_model_paths, "
        "model_detectors, overwrite"
    ),
    f"{RUNTIME}.distributed.get_local_torch_device": "",
    f"{RUNTIME}.managers.gpu_worker.run_scheduler_process": (
        "local_rank, rank, server_args, pipe_writer"
    ),
    f"{RUNTIME}.managers.progress_reporter.get_progress_reporter": "",
    f"{RUNTIME}.pipelines_core.request_utils.normalize_output_seeds": (
        "seed, num_outputs_per_prompt, num_prompts, prompt_index"
    ),
    f"{RUNTIME}.platforms.initialize_current_platform": "",
    f"{RUNTIME}.platforms.plugins.HookRegistry.register": "cls, target, hook, hook_type, source",
    f"{RUNTIME}.platforms.plugins.apply_plugin_hooks": "",
    f"{RUNTIME}.platforms.plugins.load_plugins": "",
    f"{RUNTIME}.server_args.ServerArgs.is_arg_explicitly_set": "self, arg_name",
    f"{RUNTIME}.server_args.prepare_server_args": "argv",
    f"{RUNTIME}.utils.hf_diffusers_utils.maybe_download_lora": (
        "model_name_or_path, local_dir, download, weight_name"
    ),
    f"{RUNTIME}.utils.hf_diffusers_utils.maybe_download_model": (
        "model_name_or_path, local_dir, download, is_lora, allow_patterns, "
        "force_diffusers_model, revision, skip_overlay_resolution"
    ),
    f"{RUNTIME}.utils.logging_utils.init_logger": "name",
    f"{RUNTIME}.utils.process.defer_full_gc_for_imports": "",
    f"{RUNTIME}.utils.process.kill_itself_when_parent_died": "",
}
"""Parameters of what is called, overridden or hooked; with dots at the end, these at least."""

ATTRIBUTES = {
    SCHEDULER: (
        "_inflight_finalizes",
        "_socket_lock",
        "context",
        "dp_replica",
        "metrics",
        "receiver",
        "request_handlers",
        "server_args",
        "worker",
    ),
    WORKER: ("defer_cache_release", "local_rank", "pipeline"),
    PIPELINE: ("_required_config_modules", "model_path", "pipeline_name"),
    f"{RUNTIME}.server_args.ServerArgs": ("_explicit_arg_names",),
}
"""Attributes that classes set, and that we read or replace."""


def explicit_options(server_args: Any) -> set[str]:
    """Names of the options that the user has given."""
    return set(server_args._explicit_arg_names)


def check_group(worker: Any, reqs: Sequence[Any]) -> None:
    """Check that requests can be saved together; raises what SGLang does."""
    worker._validate_group_forward_reqs(list(reqs))


def merge_outputs(outputs: Iterable[Any]) -> Any:
    """One output of those of several requests that came as one."""
    from sglang.multimodal_gen.runtime.managers.gpu_worker import GPUWorker

    return GPUWorker._merge_expanded_output_batches(list(outputs))


def finalize_output(worker: Any, req: Any, output: Any, save: Callable[[Any], None]) -> None:
    """Have an output's pictures saved, or prepared for its client, in the calling thread.

    Args:
        save: writes the files; called where the request asks for files.
    """
    worker._finalize_output_batch(
        output_batch=output,
        req=req,
        save_output_paths=save,
        output_metrics=worker._iter_output_metrics(output),
        deferred=True,
    )


def save_output(worker: Any, reqs: Sequence[Any], output: Any) -> None:
    """Write the pictures of a request, or of several that came as one, to their files."""
    if len(reqs) == 1:
        worker._save_output_paths(reqs[0], output)
    else:
        worker._save_group_output_paths(list(reqs), output)
