"""The demo's adapter at three scales, each picture with its prompt and scale below it."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from krea2_srt import Krea2
from tools.demo_model.contact_sheet import sheet

PROMPTS = ("a yellow star on a blue background", "a white heart on a purple background")
SCALES = (0.0, 0.5, 1.0)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools.demo_model.sepia_sheet", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="of krea2-demo-model")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args(argv)
    model = Krea2.load(args.model, dtype="float32")
    adapter = args.model / "loras" / "sepia.safetensors"
    by_scale = [
        model.generate(PROMPTS, size=(256, 256), seed=args.seed, lora={adapter: scale})
        for scale in SCALES
    ]
    pictures = [picture for row in zip(*by_scale, strict=True) for picture in row]
    captions = [f"{prompt}, scale {scale:g}" for prompt in PROMPTS for scale in SCALES]
    sheet(pictures, captions, len(SCALES)).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
