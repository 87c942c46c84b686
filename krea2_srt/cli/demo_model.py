"""krea2-demo-model: write the demo checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from krea2_srt.bytecode import write_bytecode
from krea2_srt.cli.errors import OneLineParser, add_version, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="krea2-demo-model",
        allow_abbrev=False,
        description="Write a complete, tiny Krea 2 checkpoint (about 50 MB) in the released "
        "layout. It loads in krea2-srt, in SGLang and in Diffusers, needs no GPU, and generates "
        "coloured shapes: 'a red heart on a yellow background'. An adapter (LoRA) for it, "
        "everything in sepia, is in its folder loras.",
    )
    add_version(parser)
    parser.add_argument("folder", type=Path, metavar="DIR", help="must not exist or be empty")
    parser.add_argument(
        "--random",
        action="store_true",
        help="random weights instead of trained ones, for numeric tests: it generates patterns",
    )
    parser.add_argument("--seed", type=int, help="of random weights (default 0)")
    parser.add_argument(
        "--raw", action="store_true", help="mark it as Raw (guidance, 52 steps), not as Turbo"
    )
    parser.add_argument(
        "--original-file",
        type=Path,
        metavar="FILE",
        help="also write the transformer as one file with the original release's tensor names",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    write_bytecode()
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.seed is not None and not args.random:
        parser.error("argument --seed: only random weights have one; add --random")
    with one_line_errors("krea2-demo-model"):
        if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
            raise FileExistsError(f"{args.folder} exists already and is not an empty folder")
        if args.original_file is not None:
            if args.original_file.exists():
                raise FileExistsError(f"{args.original_file} exists already")
            if not args.original_file.parent.is_dir():
                raise FileNotFoundError(f"folder {args.original_file.parent} does not exist")
        # Heavy imports only once the arguments are known to be good.
        from krea2_srt.demo.checkpoint import Weights, write_demo_checkpoint, write_original_file
        from krea2_srt.demo.random_weights import RandomWeights
        from krea2_srt.demo.trained_weights import TrainedWeights

        weights: Weights = RandomWeights(args.seed or 0) if args.random else TrainedWeights()
        write_demo_checkpoint(args.folder, weights, distilled=not args.raw)
        print(args.folder)
        if args.original_file is not None:
            write_original_file(args.folder / "transformer", args.original_file)
            print(args.original_file)


if __name__ == "__main__":
    main()
