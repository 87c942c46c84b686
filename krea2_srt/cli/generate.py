"""krea2-generate: the original code's command line, on our runner, without a server."""

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from krea2_srt.bytecode import write_bytecode
from krea2_srt.cli.errors import OneLineParser, add_version, one_line_errors
from krea2_srt.environment import read_environment
from krea2_srt.errors import RequestError
from krea2_srt.lora.scaled_files import ScaledFile, is_there, scaled_file
from krea2_srt.model.on_disk import begin_to_read
from krea2_srt.request import (
    MAX_ADAPTERS,
    MU_RANGE,
    ImageRequest,
    RequestLimits,
    check_number,
    check_scale,
    fit_size,
)
from krea2_srt.runner.config import DTYPES
from krea2_srt.threads import limit_spinning

if TYPE_CHECKING:
    from PIL.Image import Image

COMMAND = "krea2-generate"

# Where a request's field has another name on the command line than --like-this.
_FLAGS = {"prompt": "prompt", "guidance": "--guidance-scale"}


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Generate images with Krea 2.",
        epilog="Steps, guidance and timestep shift default to the checkpoint's own: Turbo 8 steps, "
        "no guidance, mu 1.15; Raw 52 steps, guidance 3.5, mu by size.",
    )
    add_version(parser)
    add = parser.add_argument
    add("prompt", nargs="?", help="what to generate")
    add("--prompt-file", type=Path, metavar="FILE", help="read the prompt from a file instead")
    add(
        "--checkpoint",
        default=os.environ.get("K2_CHECKPOINT") or "oss_turbo",
        metavar="NAME",
        help="oss_turbo, oss_raw, a folder, a .safetensors or .gguf file of the transformer, or a "
        "repo id (default $K2_CHECKPOINT or oss_turbo)",
    )
    add("--steps", type=int, help="number of denoising steps")
    add(
        *("--guidance-scale", "--cfg"),
        dest="cfg",
        type=float,
        help="classifier-free guidance in Krea's scale, where 0 is off; the original code calls "
        "it --cfg",
    )
    add("--negative-prompt", default="", help="what guidance steers away from")
    add("--mu", type=float, help="timestep shift, whatever the size")
    add("--y1", type=float, help="timestep shift at 256 image tokens")
    add("--y2", type=float, help="timestep shift at 6400 image tokens")
    for side in ("--width", "--height"):
        add(side, type=int, help="pixels (default 1024, less for a checkpoint of smaller pictures)")
    add("--num-images", type=int, default=1, help="images to generate (default 1)")
    add("--seed", type=int, default=0, help="image i uses seed + i (default 0)")
    add(
        "--output",
        default="sample",
        metavar="PREFIX",
        help="images are saved as PREFIX_0.png, PREFIX_1.png, ... (default sample)",
    )
    add(
        "--recipe",
        choices=("turbo", "raw"),
        help="sample as Turbo or as Raw, whatever the checkpoint says of itself",
    )
    for flag, part in (("--text-encoder", "Qwen3-VL-4B"), ("--vae", "Qwen-Image VAE")):
        add(
            flag,
            metavar="NAME",
            help=f"the {part}, in place of the checkpoint's own: a folder, a file or a repo id",
        )
    add(
        "--tokenizer",
        metavar="DIR",
        help="the tokenizer (default the one beside the text encoder, or the checkpoint's)",
    )
    for flag, does in (
        ("--lora", "an adapter beside the model, up to four"),
        ("--lora-merge", "an adapter that is added to the weights before they are quantised"),
    ):
        add(
            flag,
            action="append",
            default=[],
            type=scaled_file,
            metavar="FILE[:SCALE]",
            help=f"{does}; may be given several times (scale 1 unless given); see docs/lora.md",
        )
    add("--device", default="auto", help="cuda, cpu or auto (default)")
    add("--dtype", choices=DTYPES, default="bfloat16", help="compute precision (default bfloat16)")
    add(
        "--quantization",
        choices=("none", "int8", "fp8"),
        default="none",
        help="of the transformer's matrices; half the memory, and other pictures; int8 is nearer "
        "to those without than fp8 (default none)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    write_bytecode()
    parser = build_parser()
    args = parser.parse_args(argv)
    with one_line_errors(COMMAND):
        try:
            args.prompt = _prompt(args)
            # Everything that needs no checkpoint is checked before the slow imports: unset values
            # are filled with ones that always pass.
            _fitted(_request(args, steps=1, guidance=0.0, side=16), quiet=True).check(
                RequestLimits()
            )
            check_number("y1", args.y1 or 0.0, *MU_RANGE)
            check_number("y2", args.y2 or 0.0, *MU_RANGE)
            for field in ("lora", "lora_merge"):
                setattr(args, field, _lora(field, getattr(args, field)))
            _check_output(args.output, args.num_images)
            _run(args)
        except RequestError as error:
            flag = _FLAGS.get(error.field, f"--{error.field.replace('_', '-')}")
            raise error.renamed(flag) from None


def _run(args: argparse.Namespace) -> None:
    limit_spinning()  # before anything imports torch
    begin_to_read(args.checkpoint, text_encoder=args.text_encoder, vae=args.vae)
    from PIL import Image
    from tqdm import tqdm

    from krea2_srt.lora.adapter import check_different
    from krea2_srt.lora.reader import read_adapter
    from krea2_srt.model.dit_files import dit_config
    from krea2_srt.model.hub import find_checkpoint
    from krea2_srt.model.quantization import SERVED
    from krea2_srt.offline import Krea2, device_of

    device = device_of(args.device)
    checkpoint = find_checkpoint(
        args.checkpoint,
        recipe=args.recipe or read_environment().runner.recipe,
        text_encoder=args.text_encoder,
        vae=args.vae,
        tokenizer=args.tokenizer,
    )
    _refuse_shift_without_effect(args, checkpoint.sampling.distilled)
    sampling = checkpoint.sampling.with_shift(min_mu=args.y1, max_mu=args.y2)
    request = _fitted(
        _request(args, sampling.default_steps, sampling.default_guidance, sampling.default_side)
    )
    request.check(RequestLimits())
    # Read before the model is, which takes long, and once more when it is there.
    config = dit_config(checkpoint.transformer)
    for files in (args.lora, args.lora_merge):
        check_different((path, read_adapter(path, config)) for path in files)
    model = Krea2.load(
        replace(checkpoint, sampling=sampling),
        device=device,
        dtype=args.dtype,
        quantization=SERVED.get(args.quantization),
        lora_merge=args.lora_merge,
    )
    request = replace(request, adapters=model.load_lora(args.lora))
    if model.runner.text_encoder.tokenize(request.prompt)[1]:
        print(f"{COMMAND}: the prompt is too long; its end is not read", file=sys.stderr)
    with tqdm(total=request.steps * request.num_images, unit="step", disable=None) as progress:
        images = model.images([request], on_progress=lambda _: progress.update())
        for i, pixels in enumerate(images):
            _save(Image.fromarray(pixels), f"{args.output}_{i}.png")


def _refuse_shift_without_effect(args: argparse.Namespace, distilled: bool) -> None:
    for field in ("y1", "y2"):
        if getattr(args, field) is None:
            continue
        if args.mu is not None:
            raise RequestError(field, "has no effect together with --mu")
        if distilled:
            raise RequestError(field, "has no effect on Turbo, whose shift is fixed; see --mu")


def _lora(field: str, given: list[ScaledFile]) -> dict[Path, float]:
    """Scales by file.

    Raises:
        RequestError: a file is given twice, or is not there, or a scale is too large.
    """
    found: dict[Path, float] = {}
    for path, scale, _ in given:
        if path in found:
            raise RequestError(field, f"{path} is given twice")
        if not is_there(path):
            raise RequestError(field, f"{path} does not exist, or cannot be read")
        check_scale(field, path, scale)
        found[path] = scale
    if len(found) > MAX_ADAPTERS:
        raise RequestError(field, f"must be at most {MAX_ADAPTERS} adapters, got {len(found)}")
    return found


def _request(args: argparse.Namespace, steps: int, guidance: float, side: int) -> ImageRequest:
    return ImageRequest(
        prompt=args.prompt,
        width=side if args.width is None else args.width,
        height=side if args.height is None else args.height,
        steps=steps if args.steps is None else args.steps,
        guidance=guidance if args.cfg is None else args.cfg,
        negative_prompt=args.negative_prompt,
        seed=args.seed,
        num_images=args.num_images,
        mu=args.mu,
    )


def _prompt(args: argparse.Namespace) -> str:
    if (args.prompt is None) == (args.prompt_file is None):
        raise RequestError("prompt", "give either a prompt or --prompt-file")
    if args.prompt is not None:
        return str(args.prompt)
    try:
        return str(args.prompt_file.read_text(encoding="utf-8").strip())
    except UnicodeDecodeError:
        raise RequestError("prompt_file", f"{args.prompt_file} is not UTF-8 text") from None


def _fitted(request: ImageRequest, quiet: bool = False) -> ImageRequest:
    """At a size that can be generated.

    Args:
        quiet: say nothing where it is another than what was asked for.
    """
    width, height = fit_size(request.width, request.height, RequestLimits())
    fitted = replace(request, width=width, height=height)
    if fitted.size != request.size and not quiet:
        print(f"{COMMAND}: {request.size} is generated as {fitted.size}", file=sys.stderr)
    return fitted


def _check_output(prefix: str, num_images: int) -> None:
    folder = Path(os.path.dirname(prefix) or ".")  # Path("new/").parent would be "."
    if not folder.is_dir():
        raise RequestError("output", f"folder {folder} does not exist")
    if not os.access(folder, os.W_OK | os.X_OK):
        raise RequestError("output", f"folder {folder} is not writable")
    for i in range(num_images):
        if os.path.isdir(f"{prefix}_{i}.png"):
            raise RequestError("output", f"{prefix}_{i}.png is a folder")


def _save(image: "Image", path: str) -> None:
    """Write an image under its name only once it is whole."""
    file = Path(path)
    with tempfile.TemporaryDirectory(dir=file.parent, prefix=f".{file.name[:64]}.") as scratch:
        partial = Path(scratch) / "image.png"
        image.save(partial, format="PNG")
        partial.replace(file)
    print(path)


if __name__ == "__main__":
    main()
