"""The GPU benchmark, tried on the CPU: its baselines, its tables, and that it runs to the end."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from krea2_bench import tune_kernels
from krea2_bench.gpu import correctness, kernel_bandwidth, record, report
from krea2_bench.gpu.context import Context
from krea2_bench.gpu.kernel_cases import cases
from krea2_bench.gpu.models import RELEASED, quantized_copy, random_dit, random_vae
from krea2_bench.gpu.parts import PARTS
from krea2_bench.gpu.plain_dit import PlainDiT
from krea2_bench.gpu.plain_vae import Decoder3D
from krea2_bench.gpu.rows import FAILED, LEFT_OUT, Findings, Missing, Row
from krea2_bench.gpu.sequences import images, name_of
from krea2_bench.gpu.steps import measure
from krea2_bench.gpu.targets import NOT_MEASURED
from krea2_srt.engine.cost import FLOPS_PER_SQUARED_TOKEN, FLOPS_PER_TOKEN, WEIGHT_BYTES
from krea2_srt.kernels.launch import DEFAULTS, device_of, read_launches
from krea2_srt.model.dit_files import load_dit
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.quantization import Quantization
from krea2_srt.runner.packing import build_pack
from krea2_srt.runner.sequence_shape import SequenceShape
from tests.comparisons import CPU, relative_error


@pytest.fixture(scope="module")
def context() -> Context:
    return Context(CPU, smoke=True)


def test_the_plain_dit_is_ours(demo_model):
    dit = load_dit(demo_model / "transformer", CPU, torch.float32)
    pack = build_pack([SequenceShape(7, 6, 4)], dit.config, CPU)
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(24, 64, generator=generator)
    context = torch.randn(7, dit.config.hidden_size, generator=generator)
    with torch.inference_mode():
        modulation = dit.modulation(torch.tensor([0.7]))
        placed = pack.place(pack.image_spans, [tokens]), pack.place(pack.text_spans, [context])
        ours = dit(*placed, pack, modulation)[7:]
    plain = PlainDiT(dit)
    assert relative_error(plain(tokens, context, 0.7, pack.rope), ours) <= 1e-5
    shared = {p.untyped_storage().data_ptr() for p in dit.parameters()}
    assert plain.blocks[0].up.untyped_storage().data_ptr() in shared


def test_the_3d_decoder_is_ours_and_diffusers(demo_model, runner, diffusers_pipeline):
    latents = torch.randn(16, 6, 10, generator=torch.Generator().manual_seed(0))
    got = Decoder3D(runner.vae)(latents)
    assert (got - runner.vae.decode(latents[None])[0]).abs().max() <= 1e-5
    config = runner.vae.config
    mean, std = (
        torch.tensor(x).view(1, -1, 1, 1, 1) for x in (config.latents_mean, config.latents_std)
    )
    with torch.inference_mode():
        decoded = diffusers_pipeline.vae.decode(latents[None, :, None] * std + mean).sample
    assert (got - (decoded[0, :, 0] * 0.5 + 0.5).clamp(0, 1)).abs().max() <= 1e-5


def test_floors_are_the_released_models():
    linear, attention = step_flops(RELEASED.dit, [1000])
    assert linear / 1000 == pytest.approx(FLOPS_PER_TOKEN, rel=0.01)
    assert attention / 1e6 == pytest.approx(FLOPS_PER_SQUARED_TOKEN, rel=0.01)
    assert 2 * step_weight_bytes(RELEASED.dit) == pytest.approx(WEIGHT_BYTES, rel=0.01)


def test_random_weights_keep_activations_in_size(context):
    runner = context.runner
    (sequence,) = images(runner, ((64, 64),))
    for _ in range(3):
        before = sequence.tokens
        runner.step([sequence])
        velocity = (sequence.tokens - before).std() / abs(
            sequence.schedule.sigmas[sequence.step] - sequence.schedule.sigmas[sequence.step - 1]
        )
        assert 0.1 < velocity < 10


def test_a_quantised_copy_is_that_of_the_same_weights(context):
    config = context.config
    dit = random_dit(config, CPU, torch.float32)
    copy = quantized_copy(dit, Quantization("fp8"))
    assert torch.equal(copy.img_in.weight, dit.img_in.weight)
    assert torch.equal(copy.blocks[1].norm1.scale, dit.blocks[1].norm1.scale)
    linear = copy.blocks[1].ff.down
    back = linear.weight.float() * linear.scale
    assert 0 < relative_error(back, dit.blocks[1].ff.down.weight) < 0.04


def test_the_vae_is_channels_last():
    weight = random_vae(16, CPU, torch.float32).mid_resnets[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.slow
def test_a_trial_runs_to_its_end(tmp_path, capsys):
    assert gpu.main(["--smoke", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["done"] == list(PARTS)
    assert {missing["why"] for missing in stored["missing"]} == {LEFT_OUT}
    found = {(row["part"], row["what"]): row for row in stored["rows"]}
    # A trial's figures are no GPU's.
    assert {target["reached"] for target in stored["targets"]} == {NOT_MEASURED}
    assert (tmp_path / "gpu.md").read_text() in capsys.readouterr().out
    # Everything that is to be found on a GPU, in small.
    for kind in ("bf16", "fp8 row-wise", "fp8 tensor-wise", "int8", "int8 torch"):
        assert {"qkvg", "out", "gate_up", "down"} == {
            what.split()[0] for part, what in found if part == "gemm" and what.endswith(kind)
        }, kind
    for part, what in (
        ("correctness", "silu mul vs float64, 37 tokens"),
        ("gemm", "gate_up 16 bf16, sustained"),
        ("attention", "offsets captured, other lengths, vs float32"),
        ("attention", "sdpa 2048x2048 vs float32"),
        ("equality", "graph vs eager"),
        ("steps", "48x48 graph"),
        ("steps", "48x48 fp8 graph"),
        ("steps", "48x48 int8 graph"),
        ("steps", "32x32 gap"),
        ("text", "5 words graph"),
        ("text", "a step captured after the text encoder"),
        ("vae", "48x64 first, searched"),
        ("beside", "pixels that differ"),
        ("pictures", "32x32 int8"),
        ("pictures", "64x64 fp8"),
        ("fused", "SwiGLU 24 bf16, fused"),
        ("fused", "int8 product 24, torch"),
        ("fused", "gated attention 1024x1024, fused"),
        ("plain", "32x32 plain"),
        ("precision", "int8 velocity 32x32, last step"),
        ("compile", "48x48 compiled"),
        ("packs", "3 of 32x32 graph"),
        ("vae 3-D", "64x64 difference"),
    ):
        assert (part, what) in found
    assert found["steps", "48x48 graph"]["how"] == "graph, offsets"
    assert found["steps", "48x48 eager"]["how"] == "eager, sdpa"
    assert found["beside", "pixels that differ"]["value"] == 0


def test_what_fails_in_a_part_is_a_row_with_its_traceback(tmp_path, monkeypatch, capsys):
    def broken(context):
        context.findings.add(Row("steps", "half", 1.0, "ms"))
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setitem(PARTS, "steps", replace(PARTS["steps"], run=broken))
    parts = ["--only", "ceilings", "steps", "steps_8bit"]
    assert gpu.main(["--smoke", *parts, "--output", str(tmp_path)]) == 1
    stored = json.loads((tmp_path / "gpu.json").read_text())
    (missing,) = (missing for missing in stored["missing"] if missing["why"] == FAILED)
    assert missing["part"] == "steps"
    assert missing["reason"] == "RuntimeError: CUDA error: no kernel image"
    assert "in broken" in missing["trace"]
    assert stored["done"] == ["ceilings", "steps_8bit"]
    assert {row["part"] for row in stored["rows"]} == {"ceilings", "steps"}
    page = (tmp_path / "gpu.md").read_text()
    assert page.index("## What failed") < page.index("no kernel image") < page.index("in broken")


def test_every_wrong_kernel_is_found(context, monkeypatch):
    right = context.operations
    half = {"silu_mul": lambda x, format=None: x.chunk(2, 1)[0], "sigmoid_gate": lambda x, g, f: x}
    found = Context(CPU, smoke=True)
    monkeypatch.setattr(found, "operations", type(right)(**{**vars(right), **half}))
    correctness.run(found)
    wrong = {missing.what.partition(" vs")[0] for missing in found.findings.missing}
    assert wrong == {"silu mul", "sigmoid gate"}
    assert all("WrongResult" in missing.reason for missing in found.findings.missing)
    assert found.findings.get("correctness", "norm vs float64, 61 tokens") < 1e-5


def test_what_is_timed_does_not_fit_into_the_cache(context):
    least = 3_000_000
    moved = {case.what: case.nbytes for case in cases(context, 40, least)}
    assert moved["euler"] >= least
    # On an H200, whose cache is 60 MB.
    assert kernel_bandwidth.TOKENS * RELEASED.dit.hidden_size * 2 > 3 * 60e6


def test_a_step_that_cannot_be_captured_is_no_graph_row(monkeypatch):
    found = Context(CPU, smoke=True)

    def refuse(function):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(found, "capture", refuse)
    measure(found, "steps", found.runner, "", ((32, 32),))
    assert [row.what for row in found.findings.rows] == ["32x32 eager"]
    assert found.findings.rows[0].how == "eager, sdpa"
    (missing,) = found.findings.missing
    assert (missing.what, missing.why) == ("32x32 graph", LEFT_OUT)
    assert missing.reason.startswith("ran eagerly: ")


def test_without_a_gpu_nothing_is_called_reached(tmp_path):
    assert gpu.main(["--plan", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert len(stored["targets"]) == 33
    assert all(t["measured"] == t["reached"] == NOT_MEASURED for t in stored["targets"])
    assert stored["rows"] == []


def test_without_a_gpu_the_benchmark_says_so(tmp_path, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        gpu.main(["--output", str(tmp_path)])
    assert ended.value.code == 2
    assert "no CUDA GPU" in capsys.readouterr().err
    assert not (tmp_path / record.NAME).exists()


def test_launches_are_not_searched_on_a_cpu(tmp_path, capsys):
    with pytest.raises(SystemExit):
        gpu.main(["--smoke", "--tune", "--output", str(tmp_path)])
    assert "a search on a CPU says nothing" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_shares_are_of_the_floor():
    assert Row("a", "b", 200.0, "ms", floor=100.0).share == 0.5
    assert Row("a", "b", 200.0, "GB/s", floor=400.0, better="more").share == 0.5
    assert Row("a", "b", 200.0, "ms").share is None
    row = Row("a", "b", 200.0, "ms", 190, 210, 100.0, how="graph, fa3")
    table = report.markdown(Findings([row]), {})
    assert "| b | 200 ms (190 to 210) | 100 | 50% | graph, fa3 |  |  |" in table


def test_what_is_missing_is_in_the_page():
    found = Findings(missing=[Missing("attention", "fa4", LEFT_OUT, "a | b")])
    page = report.markdown(found, {})
    assert "## What does not run here\n\n- attention, fa4: a | b" in page


def test_a_search_of_launches_is_stored_and_read_again(context, tmp_path):
    device = device_of(CPU)
    before = dict(device.launches)
    try:
        found = tune_kernels.search(context)
    finally:
        device.launches.update(before)
    assert found.keys() == {name for name in DEFAULTS if not name.endswith("_8bit")}
    file = tmp_path / "GPU.json"
    tune_kernels.store(found, file, "GPU")
    launches = read_launches(file)
    assert launches.keys() == DEFAULTS.keys()
    for kernel, entry in found.items():
        assert launches[kernel].num_warps == entry["launch"]["num_warps"]
    assert read_launches(tmp_path / "none.json") == DEFAULTS


def test_fewer_tokens_are_spread_over_all_processors():
    device = type(device_of(CPU))(132, dict(DEFAULTS))
    assert device.launch("norm", 100)[1] == 1
    assert device.launch("norm", 132 * 8)[1] == 2
    assert device.launch("norm", 100_000)[1] == DEFAULTS["norm"].tokens


def test_names_of_sizes():
    assert name_of(256) == "256x256"
    assert name_of(256, 8) == "8 of 256x256"
    assert name_of(832, height=1216) == "832x1216"


def test_the_committed_table_is_that_of_the_committed_figures():
    folder = Path(gpu.__file__).parent / "results"
    stored = json.loads((folder / "gpu.json").read_text())
    header = {name: stored[name] for name in ("machine", "sources") if name in stored}
    found = record.findings_of([*stored["rows"], *stored["missing"]]) if header else None
    page = report.markdown(found, header)
    assert (folder / "gpu.md").read_text() == page
    # Also the estimates beside the targets, which are computed.
    assert all(target["estimate"] in page for target in stored["targets"])
