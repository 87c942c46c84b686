"""Jobs of the benchmark's child processes: ``python -m krea2_bench.workers JOB MODEL SETTINGS``.

A job answers in lines of JSON on stdout; logs go to stderr. SGLang's own worker processes import
this module again, so it must not import anything heavy.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from krea2_bench.threads.jobs import compute, generate
from krea2_srt.threads import limit_spinning

if TYPE_CHECKING:
    from diffusers import AutoencoderKLQwenImage
    from torch import Tensor

    from krea2_srt.runner.model_runner import Krea2Runner

SIDE = 512
"""Pixels a side of the pictures."""

STEPS = 8
PROMPT = "a red fox sitting in fresh snow, golden hour, photorealistic"
DECODE_SIDES = (512, 1024)
MAX_PIXEL_DIFFERENCE = {"float32": 1e-4, "bfloat16": 0.1}
"""Between the two VAE decoders' pixels, which lie in [0, 1]; more is not rounding."""

NEW_PROMPTS = 9
CACHED_REPEATS = 99

Message = dict[str, Any]


def serve_engine(model: Path, settings: Message) -> Iterator[Message]:
    """SGLang's engine: a picture for every line {"prompt", "seed"} on stdin.

    Args:
        model: checkpoint folder.
        settings: further arguments of ``DiffGenerator.from_pretrained``, with "output_path".

    Yields:
        {"worker_pid"} once it is ready, then {"stages", "request"} of each picture, in ms.
    """
    os.environ["SGLANG_DIFFUSION_STAGE_LOGGING"] = "1"
    os.environ["SGLANG_PERF_LOG_DIR"] = settings["output_path"]
    from sglang.multimodal_gen import DiffGenerator

    generator = DiffGenerator.from_pretrained(
        model_path=str(model), local_mode=True, sleep_on_idle=True, host="127.0.0.1", **settings
    )
    try:
        (worker,) = generator.local_scheduler_process
        yield {"worker_pid": worker.pid}
        for line in sys.stdin:
            request = json.loads(line) | {
                "width": SIDE,
                "height": SIDE,
                "num_inference_steps": STEPS,
            }
            start = time.perf_counter()
            result = generator.generate(sampling_params_kwargs=request)
            if result is None:
                raise RuntimeError("SGLang generated no picture")
            yield {"stages": result.metrics["stages"], "request": _ms_since(start)}
    finally:
        generator.shutdown()


def decode(model: Path, settings: Message) -> Iterator[Message]:
    """Both VAE decoders on the same latents, in turn, ``settings["rounds"]`` times.

    Yields:
        by size and dtype {"ours", "theirs", "difference"}: ms of each round, and the largest
        difference between the two pictures' pixels, which lie in [0, 1].
    """
    import torch
    from diffusers import AutoencoderKLQwenImage

    from krea2_srt.model.vae_files import load_vae

    answer = {}
    for dtype_name, tolerance in MAX_PIXEL_DIFFERENCE.items():
        dtype = getattr(torch, dtype_name)
        ours = load_vae(model / "vae", torch.device("cpu"), dtype)
        theirs = AutoencoderKLQwenImage.from_pretrained(model / "vae", dtype=dtype).eval()
        for side in DECODE_SIDES:
            name = f"{side}x{side} {dtype_name}"
            generator = torch.Generator().manual_seed(side)
            latents = torch.randn(1, 16, side // 8, side // 8, generator=generator)
            # The two decodes that are compared also warm both up.
            difference = (ours.decode(latents) - _diffusers_decode(theirs, latents)).abs().max()
            if not difference <= tolerance:
                raise RuntimeError(f"VAE decode, {name}: the pictures differ by {difference:.3g}")
            times = [
                (_ms(ours.decode, latents), _ms(_diffusers_decode, theirs, latents))
                for _ in range(settings["rounds"])
            ]
            answer[name] = {
                "ours": [ms for ms, _ in times],
                "theirs": [ms for _, ms in times],
                "difference": difference.item(),
            }
    yield answer


def generate_ours(model: Path, settings: Message) -> Iterator[Message]:
    """Load our model and generate a picture; yields {"peak"}, the peak memory of it all in MiB."""
    del settings
    limit_spinning()
    from krea2_srt import Krea2

    Krea2.load(model, device="cpu").generate(PROMPT, size=(SIDE, SIDE), steps=STEPS)
    yield {"peak": peak_memory_mib(os.getpid())}


def generate_diffusers(model: Path, settings: Message) -> Iterator[Message]:
    """Load Diffusers' pipeline and generate a picture; yields {"peak"} like `generate_ours`."""
    del settings
    import torch
    from diffusers import Krea2Pipeline

    pipeline = Krea2Pipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipeline(PROMPT, height=SIDE, width=SIDE, num_inference_steps=STEPS, guidance_scale=0.0)
    yield {"peak": peak_memory_mib(os.getpid())}


def encode(model: Path, settings: Message) -> Iterator[Message]:
    """Encode new prompts, then one of them many times; yields {"new", "cached"}, lists of ms."""
    del settings
    runner = _load_runner(model)
    runner.encode(["a prompt to warm up with"])
    prompts = [f"{PROMPT}, number {i}" for i in range(NEW_PROMPTS)]
    new = [_ms(runner.encode, [prompt]) for prompt in prompts]
    cached = [_ms(runner.encode, prompts[:1]) for _ in range(CACHED_REPEATS)]
    yield {"new": new, "cached": cached}


def peak_memory_mib(pid: int) -> float:
    """Largest resident set of a running process so far (VmHWM), in MiB."""
    for line in Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError(f"process {pid} has no memory any more")


def _load_runner(model: Path) -> "Krea2Runner":
    limit_spinning()
    import torch

    from krea2_srt.model.checkpoint import Krea2Checkpoint
    from krea2_srt.runner.model_runner import Krea2Runner

    checkpoint = Krea2Checkpoint.from_folder(model)
    return Krea2Runner.load(checkpoint, torch.device("cpu"), torch.bfloat16)


def _diffusers_decode(vae: "AutoencoderKLQwenImage", latents: "Tensor") -> "Tensor":
    """As Diffusers' pipeline: latents [1, 16, h, w] to pixels [1, 3, 8 * h, 8 * w] in [0, 1]."""
    import torch

    with torch.inference_mode():
        x = latents[:, :, None].to(vae.dtype)
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1, 1).to(x.dtype)
            for values in (vae.config.latents_mean, vae.config.latents_std)
        )
        pixels = vae.decode(x * std + mean, return_dict=False)[0][:, :, 0]
        return pixels.float().mul(0.5).add(0.5).clamp(0, 1)


def _ms(function: Callable[..., object], *args: object) -> float:
    start = time.perf_counter()
    function(*args)
    return _ms_since(start)


def _ms_since(start: float) -> float:
    return round((time.perf_counter() - start) * 1e3, 4)


_JOBS = (serve_engine, decode, generate_ours, generate_diffusers, encode, generate, compute)
JOBS = {job.__name__: job for job in _JOBS}


def main() -> None:
    parser = argparse.ArgumentParser(allow_abbrev=False, description="A job of the benchmark.")
    parser.add_argument("job", choices=JOBS)
    parser.add_argument("model", type=Path)
    parser.add_argument("settings", type=json.loads)
    args = parser.parse_args()
    # Libraries log to stdout: the answers keep its pipe, and everything else goes to stderr.
    with os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8") as answers:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        for answer in JOBS[args.job](args.model, args.settings):
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
