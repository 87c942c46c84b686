import pytest
import torch

from krea2_srt.model.latents import initial_noise, patchify, unpatchify
from tests.comparisons import CPU


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_seed_gives_the_noise_that_diffusers_generates(diffusers_pipeline, dtype):
    generators = [torch.Generator().manual_seed(seed) for seed in (7, 8)]
    expected = diffusers_pipeline.prepare_latents(2, 16, 96, 160, dtype, CPU, generators)
    for image, seed in enumerate((7, 8)):
        noise = initial_noise(160, 96, seed, CPU, dtype)
        assert torch.equal(patchify(noise), expected[image])


def test_unpatchify_undoes_patchify():
    latents = torch.randn(16, 6, 10)
    assert torch.equal(unpatchify(patchify(latents), 3, 5), latents)
