"""krea2-convert: a checkpoint in another layout or in 8 bits, so that no start converts it."""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from krea2_srt.bytecode import write_bytecode
from krea2_srt.cli.errors import OneLineParser, add_version, one_line_errors
from krea2_srt.threads import limit_spinning

if TYPE_CHECKING:
    from krea2_srt.convert.convert import Converted
    from krea2_srt.convert.plan import OnProgress

COMMAND = "krea2-convert"

_PARTS = ("text_encoder", "vae", "tokenizer")


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=COMMAND,
        allow_abbrev=False,
        description="Write a Krea 2 checkpoint in another layout or in 8 bits. OUT appears when "
        "all of it is on the disk and was read back from there, or not at all; what was lost is "
        "said in the end.",
        epilog="What is served from OUT is, with the same --quantization, the same to the last bit "
        "as from IN. See docs/checkpoints.md.",
    )
    add_version(parser)
    add = parser.add_argument
    add(
        "checkpoint",
        metavar="IN",
        help="oss_turbo, oss_raw, a folder, a single file or a repo id",
    )
    add("out", type=Path, metavar="OUT", help="folder or file to write; must not exist")
    add(
        "--quantization",
        choices=("none", "int8", "fp8"),
        default="none",
        help="int8, fp8: the matrices of the transformer's blocks in 8 bits with a scale per row, "
        "those in int8 rotated (int8_convrot); half the size, and other pictures; what else there "
        "is stays as it is (default none)",
    )
    add(
        "--layout",
        choices=("folder", "file"),
        default="folder",
        help="folder: all parts, as released; without --quantization Diffusers and SGLang load it "
        "too. file: the transformer alone with the original names, as ComfyUI has it (default "
        "folder)",
    )
    add(
        "--recipe",
        choices=("turbo", "raw"),
        help="mark it as Turbo or as Raw, whatever the checkpoint says of itself",
    )
    for part, what in (("text-encoder", "Qwen3-VL-4B"), ("vae", "Qwen-Image VAE")):
        text = f"{what}: a folder, a single file or a repo id, to go with a single file"
        add(f"--{part}", metavar="NAME", help=text)
    add("--tokenizer", metavar="DIR", help="the text encoder's, where it does not lie beside it")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    write_bytecode()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.layout == "file":
        for part in _PARTS:
            if getattr(args, part) is not None:
                flag = f"--{part.replace('_', '-')}"
                parser.error(f"argument {flag}: --layout file writes the transformer alone")
        if args.out.suffix != ".safetensors":
            parser.error(f"argument OUT: a file's name must end in .safetensors, got {args.out}")
    elif args.out.suffix == ".safetensors":
        parser.error(f"argument OUT: {args.out} would be a folder; add --layout file")
    with one_line_errors(COMMAND):
        _run(args)


def _run(args: argparse.Namespace) -> None:
    limit_spinning()  # before anything imports torch
    from tqdm import tqdm

    from krea2_srt.convert.atomic import check_new

    check_new(args.out)  # before anything is downloaded
    with tqdm(unit="B", unit_scale=True, disable=None) as bar:

        def on_progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        converted = _convert(args, on_progress)
    print("\n".join(_report(args, converted)))


def _convert(args: argparse.Namespace, on_progress: "OnProgress") -> "Converted":
    from krea2_srt.convert.convert import convert_to_file, convert_to_folder
    from krea2_srt.model.checkpoint import SamplingDefaults
    from krea2_srt.model.hub import ModelHub, find_checkpoint
    from krea2_srt.model.parts import CheckpointSource, find_transformer
    from krea2_srt.model.quantization import SERVED
    from krea2_srt.model.recipe import AUTO

    quantization = SERVED.get(args.quantization)
    if args.layout == "file":
        source = CheckpointSource(args.checkpoint, args.recipe or AUTO)
        found = find_transformer(source, ModelHub())
        sampling = SamplingDefaults(found.turbo)
        return convert_to_file(found.transformer, sampling, args.out, quantization, on_progress)
    checkpoint = find_checkpoint(
        args.checkpoint,
        recipe=args.recipe,
        text_encoder=args.text_encoder,
        vae=args.vae,
        tokenizer=args.tokenizer,
    )
    return convert_to_folder(checkpoint, args.out, quantization, on_progress)


def _report(args: argparse.Namespace, converted: "Converted") -> Iterator[str]:
    yield str(converted.out)
    before, after = _size(converted.bytes_before), _size(converted.bytes_after)
    counts = ", ".join(f"{count} {how}" for how, count in converted.tensors.items())
    yield f"transformer: {before} before, {after} now; tensors: {counts}"
    if converted.losses:
        yield "relative errors, by matrix (mean, worst, where):"
        width = max(len(loss.kind) for loss in converted.losses)
        for loss in converted.losses:
            yield f"  {loss.kind:{width}}  {loss.mean:.3%}  {loss.worst:.3%}  {loss.name}"
    else:
        yield "nothing is lost: all tensors have the same numbers"
    if args.layout == "file":
        yield (
            "without text encoder, tokenizer, VAE and scheduler settings: the first three are "
            "named beside it where it is used"
        )
    if converted.left_behind:
        yield f"not part of a checkpoint, left behind: {', '.join(converted.left_behind)}"


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.2f} MB"


if __name__ == "__main__":
    main()
