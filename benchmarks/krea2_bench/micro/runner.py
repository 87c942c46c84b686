"""What the model runner does on the host for every pack and every known prompt."""

from itertools import cycle
from pathlib import Path

import torch

from krea2_bench.micro.timing import PLAIN_PYTHON, Timed, best_of, plain_python
from krea2_srt.model.checkpoint import Krea2Checkpoint
from krea2_srt.model.config import Krea2Config
from krea2_srt.runner.model_runner import Krea2Runner
from krea2_srt.runner.packing import PackCache, build_pack
from krea2_srt.runner.sequence_shape import SequenceShape

_CPU = torch.device("cpu")
_SIDES = (256, 512, 768, 1024)
_SEQUENCES = 16
_HITS = 50
PROMPT = "a red fox sitting in fresh snow, golden hour, photorealistic"


def packing(rounds: int) -> list[Timed]:
    """The layout of a new pack of 16 mixed images, and of one that was seen before."""
    config = Krea2Config()
    shapes = tuple(
        SequenceShape(20 + i, side // 16, side // 16)
        for i, side in zip(range(_SEQUENCES), cycle(_SIDES), strict=False)
    )
    packs = PackCache(config, _CPU, max_bytes=2**30)
    packs.get(shapes)
    rope = packs.get(shapes).rope
    rows = {(s.rows, s.columns): rope[: s.image_tokens].clone() for s in shapes}
    num_tokens = sum(shape.tokens for shape in shapes)

    def build() -> None:
        build_pack(shapes, config, _CPU, lambda rows_, columns: rows[rows_, columns])

    def copies() -> None:
        """As many bytes, and nothing worked out: what a pack cannot do without."""
        out = torch.ones(num_tokens, rope.shape[1], dtype=rope.dtype)
        at = 0
        for shape in shapes:
            out[at : at + shape.image_tokens] = rows[shape.rows, shape.columns]
            at += shape.tokens

    def hits() -> None:
        for _ in range(_HITS):
            packs.get(shapes)

    new_ms, copies_ms = best_of(build, copies, rounds)
    hit_ms, python_ms = best_of(hits, plain_python, rounds)
    return [
        Timed("new pack of 16 images", new_ms, "copies of its size", copies_ms),
        Timed("known pack of 16 images", hit_ms / _HITS, PLAIN_PYTHON, python_ms),
    ]


def cached_prompt(checkpoint: Path, rounds: int) -> Timed:
    """Encoding a prompt that is in the cache."""
    runner = Krea2Runner.load(Krea2Checkpoint.from_folder(checkpoint), _CPU, torch.bfloat16)
    runner.encode([PROMPT])

    def hits() -> None:
        for _ in range(_HITS):
            runner.encode([PROMPT])

    hit_ms, python_ms = best_of(hits, plain_python, rounds)
    return Timed("cached prompt", hit_ms / _HITS, PLAIN_PYTHON, python_ms)
