"""The GPU benchmark, tried on the CPU: its baselines, its tables, and that it runs to the end."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu, tune_kernels
from benchmarks.on_gpu import correctness, report, steps
from benchmarks.on_gpu.context import Context
from benchmarks.on_gpu.models import RELEASED, quantized_copy, random_dit, random_vae
from benchmarks.on_gpu.plain_dit import PlainDiT
from benchmarks.on_gpu.plain_vae import Decoder3D
from benchmarks.on_gpu.rows import Findings, Row
from benchmarks.on_gpu.targets import NOT_MEASURED, TARGETS
from krea2_srt.engine.cost import FLOPS_PER_SQUARED_TOKEN, FLOPS_PER_TOKEN, WEIGHT_BYTES
from krea2_srt.kernels.launch import DEFAULTS, device_of, read_launches
from krea2_srt.model.checkpoint import load_dit
from krea2_srt.model.flops import step_flops, step_weight_bytes
from krea2_srt.model.quantization import Quantization
from krea2_srt.runner.packing import SequenceShape, build_pack
from tests.conftest import CPU, relative_error


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
    (sequence,) = correctness.images(runner, ((64, 64),))
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


def test_a_trial_runs_to_its_end(tmp_path, capsys):
    assert gpu.main(["--smoke", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert {row["part"] for row in stored["rows"]} == set(gpu.PARTS)
    assert stored["failures"] == {}
    # A trial's figures are no GPU's.
    assert {target["reached"] for target in stored["targets"]} == {NOT_MEASURED}
    assert (tmp_path / "gpu.md").read_text() in capsys.readouterr().out


def test_a_part_that_fails_is_reported_and_the_others_run(tmp_path, monkeypatch, capsys):
    def broken(context):
        context.findings.rows.append(Row("steps", "half", 1.0, "ms"))
        raise RuntimeError("CUDA error: no kernel image\nand more")

    monkeypatch.setitem(gpu.PARTS, "steps", broken)
    parts = ["--only", "ceilings", "steps", "vae"]
    assert gpu.main(["--smoke", *parts, "--output", str(tmp_path)]) == 1
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert stored["failures"] == {"steps": "RuntimeError: CUDA error: no kernel image"}
    assert {row["part"] for row in stored["rows"]} == {"ceilings", "steps", "vae"}
    assert "no kernel image" in (tmp_path / "gpu.md").read_text()


def test_a_wrong_kernel_is_found(context, monkeypatch):
    wrong = context.dit.operations
    monkeypatch.setattr(
        context.dit,
        "operations",
        type(wrong)(**{**vars(wrong), "silu_mul": lambda x, format=None: x.chunk(2, 1)[0]}),
    )
    with pytest.raises(correctness.WrongResult, match="silu mul vs float64"):
        correctness.run(context)


def test_without_a_gpu_nothing_is_called_reached(tmp_path):
    assert gpu.main(["--plan", "--output", str(tmp_path)]) == 0
    stored = json.loads((tmp_path / "gpu.json").read_text())
    assert len(stored["targets"]) == len(TARGETS)
    assert all(t["measured"] == t["reached"] == NOT_MEASURED for t in stored["targets"])
    assert stored["rows"] == []


def test_without_a_gpu_the_benchmark_says_so(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit) as ended:
        gpu.main([])
    assert ended.value.code == 2
    assert "no CUDA GPU" in capsys.readouterr().err


def measured(scale: float) -> Findings:
    """All figures of the targets, each that many times as good as it must be."""
    ms = {
        "1024x1024 graph": 160 / scale,
        "2048x2048 graph": 845 / scale,
        "256x256 graph": 13 / scale,
        "512x512 graph": 43 / scale,
        "4 of 512x512 graph": 155 / scale,
        "8 of 256x256 graph": 90 / scale,
    }
    floors = {
        "1024x1024 graph": 143,
        "2048x2048 graph": 744,
        "256x256 graph": 10,
        "512x512 graph": 34.5,
        "4 of 512x512 graph": 138,
        "8 of 256x256 graph": 79,
    }
    rows = [Row("steps", what, value, "ms", floor=floors[what]) for what, value in ms.items()]
    for what, value in {
        "1024x1024 plain": 160 / scale * 1.3 * scale,
        "256x256 plain": 13 / scale * 3 * scale,
        "256x256 compiled": 13 / scale * scale,
        "1024x1024 compiled": 160 / scale * 2,
        "1024x1024 fp8": 160 / scale / 1.5 / scale,
        "2048x2048 fp8": 845 / scale / 1.4 / scale,
        "256x256 host": 0.5 / scale,
    }.items():
        rows.append(Row("steps", what, value, "ms"))
    pictures = {"1024x1024": (1370, 950), "2048x2048": (7000, 5000)}
    for side, pair in pictures.items():
        for how, value in zip(("bf16", "fp8"), pair, strict=True):
            rows.append(Row("pictures", f"{side} {how}", value / scale, "ms"))
    for side, value in (("1024x1024", 45), ("2048x2048", 190)):
        rows.append(Row("vae", f"{side} ours", value / scale, "ms"))
    rows.append(Row("vae", "1024x1024 3-D original", 45 * 3, "ms"))
    return Findings(rows)


@pytest.mark.parametrize(("scale", "verdict"), [(1.02, "yes"), (0.97, "no")])
def test_targets_know_which_way_is_better(scale, verdict):
    found = measured(scale)
    for target in TARGETS:
        assert target.verdict(found)[1] == verdict, target.what


def test_shares_are_of_the_floor():
    assert Row("a", "b", 200.0, "ms", floor=100.0).share == 0.5
    assert Row("a", "b", 200.0, "GB/s", floor=400.0, better="more").share == 0.5
    assert Row("a", "b", 200.0, "ms").share is None
    table = report.markdown(Findings([Row("a", "b", 200.0, "ms", 190, 210, 100.0)]), {})
    assert "| b | 200 ms (190 to 210) | 100 | 50% |  |" in table


def test_a_search_of_launches_is_stored_and_read_again(context, tmp_path):
    device = device_of(CPU)
    before = dict(device.launches)
    try:
        found = tune_kernels.search(context)
    finally:
        device.launches.update(before)
    assert set(found) == {name for name in DEFAULTS if not name.endswith("_fp8")}
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
    assert steps.name_of(256) == "256x256"
    assert steps.name_of(256, 8) == "8 of 256x256"


def test_the_committed_table_is_that_of_the_committed_figures():
    folder = Path(gpu.__file__).parent / "results"
    stored = json.loads((folder / "gpu.json").read_text())
    rows = [Row(**{k: v for k, v in row.items() if k != "share"}) for row in stored["rows"]]
    found = Findings(rows, stored["failures"]) if stored["machine"] else None
    assert (folder / "gpu.md").read_text() == report.markdown(found, stored["machine"])
