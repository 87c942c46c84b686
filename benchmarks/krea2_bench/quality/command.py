"""krea2-bench quality: pictures of configurations side by side, and what 8 bits cost by matrix."""

import argparse
from pathlib import Path
from typing import Any

from krea2_bench.arguments import count
from krea2_bench.quality.cases import CaseError
from krea2_bench.quality.generators import SYNTAX
from krea2_srt.threads import limit_spinning

BUDGET_S = 600
SENSITIVITY = "int8,fp8"


def add_parser(commands: Any) -> None:
    """The subcommand's options."""
    parser = commands.add_parser(
        "quality",
        help="compare pictures",
        allow_abbrev=False,
        description=__doc__,
        epilog=f"A configuration is {SYNTAX}.",
    )
    add = parser.add_argument
    add(
        "configurations",
        nargs="*",
        metavar="CONFIGURATION",
        help="two or more; the last, for example ours or diffusers, is what the others are "
        "compared to (default: ours in int8 and in fp8, against ours in bf16)",
    )
    add("--checkpoint", type=Path, default=Path("demo-model/krea-2-demo"), metavar="DIR")
    add("--prompts", type=Path, metavar="FILE", help="one a line; by default some of our own")
    add("--count", type=count, help="of our own prompts (default 12, with --sensitivity 4)")
    add("--size", default="512x512", help="of the pictures (default 512x512)")
    add("--steps", type=count, default=8, help="denoising steps (default 8)")
    add("--guidance", type=float, default=0.0, help="Krea's scale; 0 is off (default)")
    add("--seed", type=int, default=0, help="of the first picture; then one more each (default 0)")
    add("--clip", metavar="MODEL", help="folder or repo id of a CLIP model, for CLIPScore")
    add(
        "--sensitivity",
        nargs="?",
        const=SENSITIVITY,
        metavar="FORMATS",
        help="generate no pictures: measure what each matrix of the blocks loses in 8 bits, and "
        f"say which should stay in 16 (formats with commas between them, default {SENSITIVITY})",
    )
    add(
        "--budget-s",
        type=count,
        help="seconds that --sensitivity may take; with fewer it looks at fewer of the steps "
        f"(default {BUDGET_S})",
    )
    add(
        "--output",
        type=Path,
        default=Path("krea2-bench-quality"),
        metavar="PREFIX",
        help="results go to PREFIX.json and PREFIX.png, with --sensitivity to PREFIX.json and "
        "PREFIX.md (default %(default)s)",
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The subcommand; returns its exit code."""
    limit_spinning()
    if args.sensitivity is not None:
        if args.configurations:
            raise CaseError(
                f"{args.configurations[0]!r}: --sensitivity takes no configurations but formats, "
                f"as in --sensitivity={SENSITIVITY}"
            )
        if args.clip is not None:
            raise CaseError("--clip: has no effect with --sensitivity, which generates no pictures")
        from krea2_bench.quality.sensitivity.command import write_sensitivity

        return write_sensitivity(args, args.budget_s or BUDGET_S)
    if args.budget_s is not None:
        raise CaseError("--budget-s: has no effect without --sensitivity")
    if len(args.configurations) == 1:
        raise CaseError(f"{args.configurations[0]!r}: name what it is compared to as well")
    from krea2_bench.quality.pictures import compare

    return compare(args)
