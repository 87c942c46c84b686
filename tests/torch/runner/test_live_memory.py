"""The memory plan's figures are what is alive at the fullest moment, at the released sizes."""

import pytest
import torch

from krea2_srt.kernels.operations import TRITON
from krea2_srt.kernels.products import scaled_product_torch, scaled_product_triton
from krea2_srt.kernels.quantize import QuantizedTokens
from krea2_srt.kernels.segment_index import SegmentIndex
from krea2_srt.model import vae as vae_module
from krea2_srt.model.config import Krea2Config
from krea2_srt.model.dit import Krea2DiT
from krea2_srt.model.modulation import Modulation
from krea2_srt.model.pack import Pack, Segments
from krea2_srt.model.pixels import quantize
from krea2_srt.model.quantization import Quantization, QuantizedLinear
from krea2_srt.model.released import TEXT_CONFIG
from krea2_srt.model.text_encoder import DEFAULT_SELECT_LAYERS, TextEncoder, empty_text_model
from krea2_srt.model.vae import VAEDecoder
from krea2_srt.model.vae_config import VAEConfig
from krea2_srt.runner.attention import SDPA, AttentionBackend, AttentionChoice
from krea2_srt.runner.graphs import MAX_PROMPT_LENGTH, MAX_PROMPTS, GraphKey, StepGraphs
from krea2_srt.runner.memory_sizes import PartSizes
from krea2_srt.runner.part_sizes import part_sizes
from krea2_srt.runner.prompt_encoder import PromptEncoder
from tests.torch.live_memory import CUDA, LiveBytes, fake_gpu, on_fake_gpu

BF16 = torch.bfloat16
CONFIG = Krea2Config()
VAE = VAEConfig(96, 16, (1, 2, 4, 4), 2, (False, True, True), (0.0,) * 16, (1.0,) * 16)
KINDS = [None, Quantization("fp8"), Quantization("int8", rotation=True)]
KINDS += [Quantization("fp8", keep=("*.ff.down",)), Quantization("fp8", keep=("3.*",))]
TOKENS = [317, 4160, 16448]


def names(kind: Quantization | None) -> str:
    return " ".join(["bf16"] if kind is None else [kind.name, *kind.keep])


def dit_of(kind: Quantization | None) -> Krea2DiT:
    with torch.device("meta"):
        dit = Krea2DiT(CONFIG, BF16, kind)
    dit.operations = TRITON
    for module in dit.modules():
        if isinstance(module, QuantizedLinear) and module.format.dtype is torch.int8:
            # torch's has sums beside its result: see `test_the_sums_of_torchs_int8_product`.
            module.product = scaled_product_triton
    return dit


@pytest.fixture(scope="module")
def text() -> torch.nn.Module:
    model, rotary = empty_text_model(TEXT_CONFIG, 35, BF16)
    model.rotary_emb = rotary
    return model


@pytest.fixture(scope="module")
def vae() -> VAEDecoder:
    with torch.device("meta"):
        vae = VAEDecoder(VAE, BF16)
    vae.use_kernels()
    return vae


def planned(dit, text, vae, scores=0, tile=1024) -> PartSizes:
    return part_sizes(dit, text, vae, tile, scores)


def check(measured: int, planned: int) -> None:
    assert 0.99 <= planned / measured <= 1.03, f"measured {measured}, planned {planned}"


def attend(q, k, v, segments):
    """Attention that keeps nothing but its output."""
    return q.new_empty(q.shape)


BACKEND = AttentionBackend("attend", attend, True)


def pack(tokens: int, images: int = 1) -> Pack:
    """A pack of so many tokens, equal images with 64 tokens of text."""
    each = tokens // images
    assert each * images == tokens

    def empty(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=CUDA)

    starts = range(0, tokens, each)
    return Pack(
        Segments(empty(images + 1), tuple((at, at + each) for at in starts), each),
        tuple((at, at + 64) for at in starts),
        tuple((at + 64, at + each) for at in starts),
        empty(tokens, CONFIG.attention_head_dim // 2, dtype=torch.complex64),
        SegmentIndex(empty(tokens), None),
        empty(tokens, 1, dtype=torch.bool),
        empty(tokens),
    )


def modulation(rows: int) -> Modulation:
    table = (rows, CONFIG.num_layers, 2, CONFIG.hidden_size)
    wide, final = (torch.empty(s, device=CUDA) for s in (table, (rows, CONFIG.hidden_size)))
    return Modulation(wide, wide, torch.empty(table, dtype=BF16, device=CUDA), final, final)


@pytest.mark.parametrize("kind", KINDS, ids=names)
def test_a_step(text, vae, kind):
    dit = dit_of(kind)
    sizes = planned(dit, text, vae)
    with fake_gpu():
        dit, rows = on_fake_gpu(dit), modulation(1)
        for tokens in TOKENS:
            layout = pack(tokens)
            image = torch.empty(tokens - 64, CONFIG.in_channels, device=CUDA)
            words = torch.empty(64, CONFIG.hidden_size, dtype=BF16, device=CUDA)
            with LiveBytes() as live:
                placed = layout.place(layout.image_spans, [image])
                context = layout.place(layout.text_spans, [words])
                x = dit.embed(placed, context, layout)
                del context
                check(live.now, sizes.paused_per_token * tokens)
                blocks = range(len(dit.blocks) if tokens == 4160 else 4)
                x = dit.run_blocks(x, layout, rows, blocks, attend)
                dit.finish(x, layout, rows)
            check(live.peak, sizes.step_per_token * tokens)


def test_the_sums_of_torchs_int8_product(text, vae):
    dit = dit_of(KINDS[2])
    sizes = planned(dit, text, vae)
    with fake_gpu():
        dit = on_fake_gpu(dit)
        linear, largest = dit.blocks[0].ff.gate_up, 0
        rows, width = linear.weight.shape
        for tokens in TOKENS:
            values = torch.empty(tokens, width, dtype=torch.int8, device=CUDA)
            x = QuantizedTokens(values, torch.empty(tokens, 1, device=CUDA))
            with LiveBytes() as live:
                scaled_product_torch(x, linear.weight, linear.scale, BF16)
            beside = live.peak - tokens * rows * BF16.itemsize
            assert 0 < beside <= sizes.int8_sums
            largest = max(largest, beside)
        check(largest, sizes.int8_sums)
    assert planned(dit_of(KINDS[1]), text, vae).int8_sums == 0


def test_the_modulation_of_a_pack_and_of_a_schedule(text, vae):
    dit = dit_of(None)
    sizes = planned(dit, text, vae)
    with fake_gpu():
        dit = on_fake_gpu(dit)
        with LiveBytes() as live:
            stacked = Modulation.stack([modulation(1) for _ in range(64)])
        check(stacked.nbytes, 64 * sizes.modulation_row)
        with LiveBytes() as live:
            dit.modulation(torch.empty(8, device=CUDA))
        check(live.peak, 8 * sizes.schedule_row)


@pytest.mark.parametrize("kind", KINDS[:2], ids=names)
def test_the_pool_of_a_captured_step(text, vae, kind):
    dit = dit_of(kind)
    sizes = planned(dit, text, vae)
    with fake_gpu():
        dit = on_fake_gpu(dit)
        for tokens in TOKENS[1:2]:
            graphs = StepGraphs(dit, attend, lambda function: function, tokens)
            with LiveBytes() as live:
                graphs.forward(GraphKey(tokens, 4, tokens))
            check(live.peak, sizes.step_per_token * tokens)


@pytest.mark.parametrize(("rows", "length"), [(8, 546), (MAX_PROMPTS, MAX_PROMPT_LENGTH)])
def test_encoding(text, vae, rows, length):
    dit = dit_of(None)
    sizes = planned(dit, text, vae)
    with fake_gpu():
        dit.text_fusion, model = on_fake_gpu(dit.text_fusion), on_fake_gpu(text)
        ids = torch.zeros(rows, length, dtype=torch.int64, device=CUDA)
        kept = torch.zeros(rows * (length - 34), dtype=torch.int64, device=CUDA)
        prompts = Segments(torch.zeros(rows + 1, dtype=torch.int32, device=CUDA), (), length)
        encoder = object.__new__(TextEncoder)  # without a tokenizer
        encoder.model, encoder.select_layers = model, DEFAULT_SELECT_LAYERS
        runs = PromptEncoder(encoder, dit, AttentionChoice(SDPA, BACKEND))
        with LiveBytes() as live:
            runs.forward(ids, kept, prompts)
    check(live.peak, sizes.encodes[-1] if rows == 8 else sizes.encode_graph)


@pytest.mark.parametrize(("tile", "scores"), [(1024, 2**26), (1024, 2**28), (0, 2**28)])
def test_a_decode(text, vae, tile, scores, monkeypatch):
    monkeypatch.setattr(vae_module, "scores_per_slice", lambda device: scores)
    sizes = planned(dit_of(None), text, vae, scores, tile)
    sides = [(256, 256), (512, 512), (1024, 1024), (1536, 1536), (2048, 2048), (832, 1216)]
    with fake_gpu():
        decoder = on_fake_gpu(vae)
        for width, height in sides:
            latents = torch.empty(16, height // 8, width // 8, device=CUDA)
            with LiveBytes() as live:
                *_, pixels = decoder.decode_slices(latents, tile)
                quantize(pixels)
            found = sizes.decode(width * height // 256)
            if width == height:
                check(live.peak, found)
            assert found >= 0.99 * live.peak  # a tile of a narrow picture is smaller
