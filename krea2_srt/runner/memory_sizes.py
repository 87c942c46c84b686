"""Bytes of a model's parts, and of what is done with them. Pure arithmetic."""

from dataclasses import dataclass
from functools import cache

from krea2_srt.request import MAX_TEXT_TOKENS
from krea2_srt.runner.streamed_blocks import BUFFERS, streamed_positions

GIB = 2**30

GRAPH_BYTES = 6 * 2**20
"""Bytes of a captured graph's own nodes. An estimate: some 400 kernels with their arguments."""


@cache  # asked for again and again while a plan is made
def _streamed(blocks: tuple[int, ...], count: int) -> tuple[int, int]:
    """Bytes of the blocks that are streamed, and of the largest."""
    sizes = [blocks[i] for i in streamed_positions(len(blocks), count)]
    return sum(sizes), max(sizes, default=0)


@dataclass(frozen=True)
class DecodeSizes:
    """Bytes of a decode. It attends at an eighth of the picture's width and height, goes on with
    the whole picture up to half of them, and ends in tiles.

    Attributes:
        attention_per_pixel: while it attends, beside the scores.
        score_bytes: of the scores that are computed at a time, at most.
        score_pixels: of the picture, for each of the pixels that attend.
        whole_per_pixel: up to half the width and height.
        kept_per_pixel: of the picture while a tile is computed.
        tile_per_pixel: of the tile.
        tile: pixels a side, with margins; 0 is no tiles.
    """

    attention_per_pixel: float
    score_bytes: int
    score_pixels: int
    whole_per_pixel: float
    kept_per_pixel: float
    tile_per_pixel: float
    tile: int

    def of(self, pixels: int) -> int:
        """Bytes for decoding a picture of so many pixels, at the fullest moment."""
        scores = 8 * (pixels // self.score_pixels) ** 2
        attention = self.attention_per_pixel * pixels + min(self.score_bytes, scores)
        tile = min(pixels, self.tile**2) if self.tile else pixels
        tiles = self.kept_per_pixel * pixels + self.tile_per_pixel * tile
        return round(max(attention, self.whole_per_pixel * pixels, tiles))


@dataclass(frozen=True)
class PartSizes:
    """Bytes of a checkpoint's parts in the dtypes that they run in.

    Attributes:
        dit, text_encoder, vae: weights.
        blocks: of `dit`, each of its blocks.
        quantized: whether those of the DiT are in 8 bits already.
        text_encoder_unit: the largest piece that is on the GPU at a time when it is offloaded.
        step_per_token: at the fullest moment of a step.
        paused_per_token: of a step that waits between two slices.
        modulation_row: of one step of one branch.
        schedule_row: of one step of a schedule while it is built.
        patch: of an image token of a sequence.
        context: of a text token of a branch.
        encodes: at the fullest moment of encoding one prompt, two, and so on.
        encode_graph: the same in the largest graph.
        decoder: of a decode.
        libraries: their workspaces.
        int8_sums: of int8 products by torch, beside their results; other kernels have none.
        graph_buffers: of all graphs together, beside ``graph_per_token``.
        graph_per_token: of the buffers.
    """

    dit: int
    text_encoder: int
    vae: int
    blocks: tuple[int, ...]
    text_encoder_unit: int
    step_per_token: int
    paused_per_token: int
    modulation_row: int
    schedule_row: int
    patch: int
    context: int
    encodes: tuple[int, ...]
    encode_graph: int
    decoder: DecodeSizes
    libraries: int
    graph_buffers: int
    graph_per_token: int
    int8_sums: int = 0
    quantized: bool = False

    def dit_on_device(self, streamed: int) -> int:
        """Bytes of the DiT on the GPU where so many of its blocks are streamed, with the buffers
        that they go through.
        """
        moved, largest = _streamed(self.blocks, streamed)
        return self.dit - moved + BUFFERS * largest

    def streamed(self, count: int) -> int:
        """Bytes that come to the GPU in each step where so many blocks are streamed."""
        return _streamed(self.blocks, count)[0]

    def pinned(self, streamed: int, encoder_resident: bool) -> int:
        """Bytes of pinned host memory: of so many blocks, and of the text encoder where it is
        offloaded.
        """
        found = self.streamed(streamed)
        return found if encoder_resident else found + self.text_encoder

    def decode(self, image_tokens: int) -> int:
        """Bytes of one image's decode."""
        return self.decoder.of(image_tokens * 256)

    def encode(self, prompts: int, resident: bool) -> int:
        """Bytes for encoding so many prompts, beside a text encoder that is resident; with the
        largest piece of one that is offloaded.
        """
        return self.encodes[prompts - 1] + (0 if resident else self.text_encoder_unit)

    def graphs(self, tokens: int, count: int, encoder: bool) -> int:
        """Bytes of graphs of up to so many tokens, with their buffers and the pool that they share;
        with or without those of the text encoder, which have a pool of their own.
        """
        if not tokens:
            return 0
        pools = self.step_per_token * tokens + self.int8_sums
        pools += self.encode_graph if encoder else 0
        return self.graph_buffers + self.graph_per_token * tokens + pools + count * GRAPH_BYTES

    def sequences(self, count: int, image_tokens: int) -> int:
        """Bytes of sequences that have begun: the largest, with the longest prompts."""
        return count * (image_tokens * self.patch + MAX_TEXT_TOKENS * self.context)
