"""Pictures of a running server, with their prompts below them."""

import argparse
import base64
import io
import textwrap
from collections.abc import Sequence
from pathlib import Path

from openai import OpenAI
from PIL import Image, ImageDraw, ImageFont

PROMPTS = (
    "a red heart on a yellow background",
    "a white star on a dark blue background",
    "a purple ring in the top left on green",
    "a striped orange square on black",
    "a green triangle to the left of a pink circle on white",
    "three black stars in front of a cyan background",
    "an outlined red circle on a white to blue gradient",
    "a large dotted pink heart on purple",
)
_SIDE, _COLUMNS, _MARGIN, _TEXT = 160, 4, 8, 34


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="tools.demo_model.contact_sheet", description=__doc__)
    parser.add_argument("--url", required=True, help="of the server")
    parser.add_argument("--size", default="256x256", help="of the pictures that are asked for")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True, metavar="PNG")
    args = parser.parse_args(argv)
    client = OpenAI(base_url=f"{args.url}/v1", api_key="unused")
    pictures = []
    for prompt in PROMPTS:
        answer = client.images.generate(
            prompt=prompt, size=args.size, extra_body={"seed": args.seed}
        )
        assert answer.data is not None
        content = base64.b64decode(answer.data[0].b64_json or "")
        pictures.append(Image.open(io.BytesIO(content)).convert("RGB"))
    sheet(pictures, PROMPTS).save(args.output, optimize=True)


def sheet(
    pictures: Sequence[Image.Image], captions: Sequence[str], columns: int = _COLUMNS
) -> Image.Image:
    """Pictures in rows, each with its caption."""
    cell_width, cell_height = _SIDE + _MARGIN, _SIDE + _TEXT + _MARGIN
    rows = -(-len(pictures) // columns)
    size = (columns * cell_width + _MARGIN, rows * cell_height + _MARGIN)
    page = Image.new("RGB", size, "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(12)
    for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
        left = _MARGIN + number % columns * cell_width
        top = _MARGIN + number // columns * cell_height
        page.paste(picture.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (left, top))
        text = "\n".join(textwrap.wrap(caption, 27))
        pen.multiline_text((left, top + _SIDE + 3), text, fill="black", font=font, spacing=1)
    return page


if __name__ == "__main__":
    main()
