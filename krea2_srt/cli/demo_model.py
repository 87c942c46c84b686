"""krea2-demo-model: write the demo checkpoint."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from krea2_srt.cli.errors import OneLineParser, one_line_errors


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="krea2-demo-model",
        allow_abbrev=False,
        description="Write a complete, tiny Krea 2 checkpoint with random weights (about 50 MB) in "
        "the released layout. It loads in krea2-srt, in SGLang and in Diffusers and draws "
        "patterns, not things: it shows that everything works without a GPU.",
    )
    parser.add_argument("folder", type=Path, metavar="DIR", help="must not exist or be empty")
    parser.add_argument("--seed", type=int, default=0, help="of the weights (default 0)")
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
    args = build_parser().parse_args(argv)
    with one_line_errors("krea2-demo-model"):
        if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
            raise FileExistsError(f"{args.folder} exists already and is not an empty folder")
        if args.original_file is not None:
            if args.original_file.exists():
                raise FileExistsError(f"{args.original_file} exists already")
            if not args.original_file.parent.is_dir():
                raise FileNotFoundError(f"folder {args.original_file.parent} does not exist")
        # Heavy imports only once the arguments are known to be good.
        from krea2_srt.demo.checkpoint import write_demo_checkpoint, write_original_file
        from krea2_srt.demo.random_weights import RandomWeights

        write_demo_checkpoint(args.folder, RandomWeights(args.seed), distilled=not args.raw)
        print(args.folder)
        if args.original_file is not None:
            write_original_file(args.folder / "transformer", args.original_file)
            print(args.original_file)


if __name__ == "__main__":
    main()
