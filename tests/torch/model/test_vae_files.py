"""VAEs as single files: names, configs, and what is no VAE of Krea 2's."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from krea2_srt.errors import CheckpointError
from krea2_srt.model.vae_config import VAEConfig
from krea2_srt.model.vae_files import load_vae, vae_config
from krea2_srt.model.vae_names import diffusers_name, other_vae, stage_length
from tests import dialects
from tests.comparisons import CPU
from tests.single_files import native_vae_name, with_damaged_headers, write_vae_file

FLOAT32 = torch.float32


@pytest.fixture(scope="module")
def folder(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A VAE whose latents have statistics of their own, which only its config states."""
    copy = tmp_path_factory.mktemp("models") / "vae"
    shutil.copytree(demo_model / "vae", copy)
    config = json.loads((copy / "config.json").read_text())
    config |= {
        "latents_mean": [i / 8 for i in range(16)],
        "latents_std": [1 + i / 8 for i in range(16)],
    }
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.fixture(scope="module")
def weights(folder: Path):
    return load_vae(folder, CPU, FLOAT32).state_dict()


def assert_same(file: Path, weights, config: VAEConfig) -> None:
    vae = load_vae(file, CPU, FLOAT32)
    assert vae.config == config
    found = vae.state_dict()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def empty(make: Callable, **options):
    with torch.device("meta"):
        return make(**options)


def shapes(vae) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in vae.state_dict().items()}


@pytest.fixture(scope="module")
def released():
    from diffusers import AutoencoderKLQwenImage

    return empty(AutoencoderKLQwenImage)


def test_names_are_those_that_diffusers_converts(released):
    """Both ways: the writer's names are what Diffusers reads, and ours become Diffusers' again."""
    from diffusers.loaders.single_file_utils import convert_wan_vae_to_diffusers

    native = {native_vae_name(name): name for name in released.state_dict()}
    assert len(native) == 194
    assert not native.keys() & released.state_dict().keys()
    assert convert_wan_vae_to_diffusers(dict(native)) == {name: name for name in native.values()}
    length = stage_length(native)
    assert {name: diffusers_name(name, length) for name in native} == native


def test_diffusers_names_stay(released):
    names = released.state_dict().keys()
    assert [diffusers_name(name, stage_length(names)) for name in names] == list(names)


@pytest.mark.parametrize("blocks", [1, 2, 3])
def test_stages_of_any_length(blocks):
    from diffusers import AutoencoderKLQwenImage

    names = shapes(empty(AutoencoderKLQwenImage, base_dim=8, num_res_blocks=blocks))
    native = {native_vae_name(name, blocks): name for name in names}
    assert len(native) == len(names)
    length = stage_length(native)
    assert {name: diffusers_name(name, length) for name in native} == native
    assert VAEConfig.from_shapes(names).num_res_blocks == blocks


@pytest.mark.parametrize("name", ["decoder.upsamples.9999999999999999999.x", "decoder.upsamples.1"])
def test_a_name_that_is_no_place_in_the_row_stays(name):
    assert stage_length([name]) == 1
    assert diffusers_name(name, 4) == name


def test_sizes_and_latents_are_the_released_ones(released):
    from diffusers import AutoencoderKLWan

    stated = VAEConfig.from_dict(dict(released.config) | {"_class_name": "AutoencoderKLQwenImage"})
    assert VAEConfig.from_shapes(shapes(released)) == stated
    assert stated.base_dim == 96
    assert stated.temporal_downsample == (False, True, True)
    wan = empty(AutoencoderKLWan)
    assert VAEConfig.from_dict(dict(wan.config) | {"_class_name": "AutoencoderKLWan"}) == stated
    assert shapes(wan) == shapes(released)


@pytest.mark.parametrize("native", [True, False])
@pytest.mark.parametrize("prefix", ["", "vae.", "first_stage_model.", "model.", "module.vae."])
def test_a_file_is_its_folder(folder, weights, tmp_path, native, prefix):
    file = tmp_path / "vae.safetensors"
    write_vae_file(folder, file, native=native, prefix=prefix, config=True)
    assert vae_config(file) == vae_config(folder)
    assert_same(file, weights, vae_config(folder))


def test_the_config_beside_a_file_is_read(folder, weights, tmp_path):
    file = write_vae_file(folder, tmp_path / "wan_2.1_vae.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(
        json.dumps(stated | {"_class_name": "AutoencoderKLWan", "out_channels": 3})
    )
    assert_same(file, weights, vae_config(folder))


def test_a_file_without_a_config_has_the_released_latents(demo_model, tmp_path):
    file = write_vae_file(demo_model / "vae", tmp_path / "qwen_image_vae.safetensors")
    expected = vae_config(demo_model / "vae")
    assert expected.latents_std[0] == 2.8184
    assert_same(file, load_vae(demo_model / "vae", CPU, FLOAT32).state_dict(), expected)


def test_the_config_of_something_else_beside_a_file_is_passed_over(demo_model, tmp_path):
    file = write_vae_file(demo_model / "vae", tmp_path / "vae.safetensors")
    shutil.copy(demo_model / "transformer" / "config.json", tmp_path)
    assert vae_config(file) == vae_config(demo_model / "vae")


def test_the_decoder_alone_is_enough(folder, weights, tmp_path):
    def decoder_only(tensors):
        for name in list(tensors):
            if name.startswith(("encoder.", "conv1.")) or ".time_conv." in name:
                del tensors[name]

    file = write_vae_file(folder, tmp_path / "vae.safetensors", config=True, edit=decoder_only)
    assert len(load_file(file)) < len(weights) + 10
    assert_same(file, weights, vae_config(folder))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_file_in_any_float_dtype(folder, weights, tmp_path, dtype):
    def cast(tensors):
        tensors.update({name: tensor.to(dtype) for name, tensor in tensors.items()})

    file = write_vae_file(folder, tmp_path / "vae.safetensors", config=True, edit=cast)
    rounded = {
        name: t.to(dtype).float() if "latents" not in name else t for name, t in weights.items()
    }
    assert_same(file, rounded, vae_config(folder))


def test_an_fp8_file_says_that_it_is_one(folder, weights, tmp_path, caplog):
    file = write_vae_file(folder, tmp_path / "vae.safetensors")
    config = (folder / "config.json").read_text()
    means = dialects.write_plain(
        load_file(file), file, dtype=dialects.E4M3, metadata={"config": config}
    )
    with caplog.at_level(logging.INFO):
        found = load_vae(file, CPU, FLOAT32)
    assert torch.equal(found.conv_in.weight, means["decoder.conv1.weight"][:, :, -1])
    (record,) = [r for r in caplog.records if r.name == "krea2_srt.model.vae_files"]
    assert "vae.safetensors" in record.message


def scaled(name: str, channels: int):
    """Makes a tensor have other output channels."""

    def edit(tensors):
        tensors[name] = tensors[name][:1].repeat(channels, *[1] * (tensors[name].dim() - 1))

    return edit


@pytest.mark.parametrize(
    ("edit", "named"),
    [
        (lambda t: t.pop("decoder.head.0.gamma"), r"decoder\.norm_out\.gamma' is missing"),
        (
            lambda t: t.pop("decoder.middle.1.proj.bias"),
            r"missing: .*mid_block\.attentions\.0\.proj",
        ),
        (lambda t: t.pop("conv2.weight"), r"missing: post_quant_conv\.weight"),
        (lambda t: t.update(surprise=torch.zeros(1)), r"unexpected tensors: surprise"),
        (
            lambda t: t.update({"decoder.upsamples.0.residual.9.bias": torch.zeros(1)}),
            r"unexpected tensors: .*residual\.9\.bias",
        ),
        (
            lambda t: t.update({"decoder.conv_in.bias": torch.zeros(64)}),
            r"decoder\.conv\w+\.bias and decoder\.conv\w+\.bias are names of the same tensor",
        ),
        (scaled("decoder.head.2.weight", 4), "an RGBA VAE, as Qwen-Image-Layered's is"),
        (scaled("decoder.head.2.weight", 12), "gives 12 channels instead of 3"),
        (scaled("conv2.weight", 8), r"post_quant_conv\.weight has shape \[8, .*expected \[16, "),
        (scaled("decoder.upsamples.8.residual.2.weight", 40), r"conv1\.weight has shape \[40, "),
    ],
)
def test_a_file_that_is_wrong_in_one_tensor_is_refused(demo_model, tmp_path, edit, named):
    file = write_vae_file(demo_model / "vae", tmp_path / "vae.safetensors", edit=edit)
    with pytest.raises(CheckpointError, match=named) as refused:
        load_vae(file, CPU, FLOAT32)
    assert str(refused.value).startswith(str(file))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ("{", "config in its metadata cannot be read"),
        ("[" * 100_000, "config in its metadata cannot be read"),
        ("[]", "config in its metadata is not a JSON object"),
        ("{}", "config in its metadata: _class_name is None"),
        (
            '{"_class_name": "AutoencoderKL"}',
            "config in its metadata: _class_name is 'AutoencoderKL'",
        ),
    ],
)
def test_metadata_that_is_no_config_is_refused(demo_model, tmp_path, config, named):
    file = write_vae_file(demo_model / "vae", tmp_path / "vae.safetensors")
    save_file(load_file(file), file, metadata={"config": config})
    with pytest.raises(CheckpointError, match=named):
        vae_config(file)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"z_dim": 48}, r"config\.json: z_dim=48"),
        ({"input_channels": 4}, r"config\.json: input_channels=4, Krea 2 needs an RGB VAE"),
        ({"_class_name": "AutoencoderKLWan", "is_residual": True}, "is_residual"),
        ({"base_dim": 32}, "has shape"),
        ({"num_res_blocks": 10**9}, "sizes must be integers from 1 to 1024, got"),
        ({"latents_std": ["x"] * 16}, "missing or of the wrong type"),
    ],
)
def test_a_config_beside_a_file_that_does_not_fit_is_refused(folder, tmp_path, change, named):
    file = write_vae_file(folder, tmp_path / "vae.safetensors")
    stated = json.loads((folder / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(stated | change))
    with pytest.raises(CheckpointError, match=named):
        load_vae(file, CPU, FLOAT32)


def sdxl():
    from diffusers import AutoencoderKL

    return shapes(empty(AutoencoderKL, latent_channels=4, block_out_channels=(32, 32)))


def flux():
    from diffusers import AutoencoderKL

    return shapes(empty(AutoencoderKL, latent_channels=16, block_out_channels=(32, 32)))


def wan_22():
    from diffusers import AutoencoderKLWan

    sizes = {"base_dim": 8, "decoder_base_dim": 8, "z_dim": 48, "is_residual": True}
    return shapes(empty(AutoencoderKLWan, **sizes, in_channels=12, out_channels=12, patch_size=2))


def wan_22_native():
    """Names as in ComfyUI's ``wan2.2_vae.safetensors``."""
    return {
        "decoder.conv1.weight": (64, 48, 3, 3, 3),
        "decoder.middle.0.residual.0.gamma": (64, 1, 1, 1),
        "decoder.upsamples.0.upsamples.0.residual.2.weight": (64, 64, 3, 3, 3),
        "decoder.head.2.weight": (12, 16, 3, 3, 3),
    }


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (sdxl, "is an AutoencoderKL of 4 latent channels"),
        (flux, "is an AutoencoderKL of 16 latent channels"),
        (wan_22, "is a Wan 2.2 VAE of 48 latent channels"),
        (wan_22_native, "is a Wan 2.2 VAE of 48 latent channels"),
        (lambda: {"decoder.1.weight": (4, 4)}, "not a Qwen-Image VAE: tensor .* is missing"),
        (lambda: {"decoder.norm_out.gamma": (0,)}, "norm_out"),
        (lambda: {"decoder.norm_out.gamma": ()}, "not a Qwen-Image VAE"),
    ],
)
def test_another_vae_is_refused(tmp_path, other, named):
    file = tmp_path / "vae.safetensors"
    save_file({name: torch.zeros(shape) for name, shape in other().items()}, file)
    with pytest.raises(CheckpointError, match=named):
        load_vae(file, CPU, FLOAT32)


def test_released_shapes_are_of_no_other_vae(released):
    assert other_vae(shapes(released)) is None


@pytest.mark.parametrize(
    ("part", "weights", "named"),
    [
        ("text_encoder", "model", "is a language model"),
        ("transformer", "diffusion_pytorch_model", "is a diffusion transformer"),
    ],
)
def test_another_part_is_refused(demo_model, part, weights, named):
    with pytest.raises(CheckpointError, match=f"{named}, Krea 2 needs the Qwen-Image VAE"):
        vae_config(demo_model / part / f"{weights}.safetensors")


def test_a_truncated_file_is_named(demo_model, tmp_path):
    file = write_vae_file(demo_model / "vae", tmp_path / "vae.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match=r"vae\.safetensors is damaged"):
        load_vae(file, CPU, FLOAT32)


def test_a_damaged_header_is_one_line_or_read(folder, tmp_path):
    """Nothing takes forever, or all memory."""
    file = write_vae_file(folder, tmp_path / "vae.safetensors", config=True)
    refused = []
    for _ in with_damaged_headers(file, 40):
        try:
            load_vae(file, CPU, FLOAT32)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 15
    assert not any("\n" in line for line in refused)
