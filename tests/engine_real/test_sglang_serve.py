"""Our runner inside the real SGLang engine, on CPU."""

import math
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

from krea2_srt.model.pixels import to_uint8
from krea2_srt.threads import SPIN_COUNT
from tests.channel import endpoints, listens_where_sglang_looks, statistics
from tests.comparisons import PROMPT, psnr
from tests.torch.runner.test_pictures import finish, start

SERVES = "krea2-srt: our runner serves"
STARTED = re.compile(
    r"krea2-srt: ready ([\d.]+) s after its process began: imports ([\d.]+) s, loading ([\d.]+) s "
    r"\([\d.]+ s of it waiting for files\), warm-up ([\d.]+) s; beside them ([\d.]+) GB were read"
)
SMALL = {"size": "128x128", "num_inference_steps": 3}


def alone(runner, prompt, seed, width=128, height=128, steps=3, guidance=0.0, negative=""):
    sequence = start(runner, prompt, width, height, steps, seed, guidance, negative)
    return to_uint8(finish(runner, [sequence])[0])


def assert_same(got: np.ndarray, expected: np.ndarray) -> None:
    """Equal but for the last bit of a float32 sum, which may tip a pixel's rounding."""
    assert got.shape == expected.shape
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


def floats(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.copy()).float() / 255


def test_one_line_says_that_our_runner_serves(server):
    lines = [line for line in server.log.splitlines() if SERVES in line]
    assert len(lines) == 1
    assert "Turbo" in lines[0]


def test_one_line_says_what_the_start_was_spent_on(server):
    (found,) = STARTED.finditer(server.log)
    ready, imports, loading, warm_up, read_gb = map(float, found.groups())
    assert ready == pytest.approx(imports + loading + warm_up, abs=0.2)
    assert imports > 0
    assert read_gb > 0.03


def test_the_workers_threads_do_not_spin_for_long(server):
    """By the plugin in SGLang's own process, before it starts the worker."""
    assert f"GOMP_SPINCOUNT = '{SPIN_COUNT}'" in server.log


def test_servers_that_start_together_take_no_port_that_both_would_find_free(server):
    """SGLang looks for one in steps of 37 long before it takes it."""
    (endpoint,) = endpoints(server.log)
    assert not listens_where_sglang_looks(statistics(endpoint)["pid"])


def test_a_picture_is_the_runners(server, runner):
    (picture,) = server.generate(prompt=PROMPT, size="192x128", num_inference_steps=4, seed=5)
    assert_same(picture, alone(runner, PROMPT, 5, 192, 128, 4))


def test_guidance_is_sglangs_scale(server, runner):
    fields = {"prompt": PROMPT, "seed": 1, "guidance_scale": 4.5, "negative_prompt": "rain"}
    (picture,) = server.generate(**fields, **SMALL)
    assert_same(picture, alone(runner, PROMPT, 1, guidance=3.5, negative="rain"))


def test_n_images_have_consecutive_seeds(server, runner):
    pictures = server.generate(prompt=PROMPT, n=3, seed=7, **SMALL)
    assert len(pictures) == 3
    for i, picture in enumerate(pictures):
        assert_same(picture, alone(runner, PROMPT, 7 + i))


def test_concurrent_requests_keep_their_own_seeds_and_prompts(server, runner):
    """Unmodified SGLang 0.5.23 gives a merged request the first one's seed + its position."""
    cases = [(PROMPT, 11), ("a blue house", 40), ("x", 11), ("a blue house", 3)]
    with ThreadPoolExecutor(len(cases)) as pool:
        pictures = list(
            pool.map(lambda case: server.generate(prompt=case[0], seed=case[1], **SMALL), cases)
        )
    for (prompt, seed), (picture,) in zip(cases, pictures, strict=True):
        assert_same(picture, alone(runner, prompt, seed))


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"size": "100000x100000"}, "width: must be between 16 and 4096"),
        ({"num_inference_steps": 10**8}, "num_inference_steps: must be between 1 and 200"),
        ({"guidance_scale": math.nan}, "guidance_scale"),  # refused by SGLang itself
        ({"seed": -3}, "seed"),
        ({"enable_teacache": True}, "enable_teacache: True is not supported by krea2-srt"),
        ({"diffusers_kwargs": {"a": 1}}, "diffusers_kwargs: {'a': 1} is not supported"),
    ],
)
def test_a_bad_request_names_its_field_and_hurts_nobody(server, runner, fields, named):
    before = len(server.log)
    status, body = server.post(**{"prompt": "x", **SMALL, **fields})
    assert status >= 400
    assert named in f"{body}{server.log[before:]}"
    (picture,) = server.generate(prompt="x", seed=2, **SMALL)
    assert_same(picture, alone(runner, "x", 2))


def test_a_size_off_the_grid_goes_up_to_it_and_the_log_says_so(server):
    before = len(server.log)
    (picture,) = server.generate(prompt="x", seed=2, **SMALL | {"size": "120x250"})
    assert picture.shape[:2] == (256, 128)
    assert "120x250 is generated as 128x256" in server.log[before:]


README_FLAGS = ("--prompt", PROMPT, "--seed", "5")


@pytest.fixture(scope="module")
def sglangs_own(sglang_generate):
    return sglang_generate(*README_FLAGS, switch="off")


@pytest.mark.slow
def test_the_readmes_command_generates_what_unmodified_sglang_generates(
    sglang_generate, sglangs_own
):
    ours = sglang_generate(*README_FLAGS)
    assert ours.log.count(SERVES) == 1
    assert SERVES not in sglangs_own.log
    assert len(ours.pictures) == len(sglangs_own.pictures) == 1
    assert psnr(floats(ours.pictures[0]), floats(sglangs_own.pictures[0])) >= 40


@pytest.mark.slow
def test_an_unsupported_flag_leaves_sglangs_own_in_place(sglang_generate, sglangs_own):
    fallback = sglang_generate(*README_FLAGS, "--attention-backend", "torch_sdpa")
    warnings = [line for line in fallback.log.splitlines() if "not supported yet" in line]
    assert len(warnings) == 1
    assert "--attention-backend; SGLang's own Krea 2 implementation serves" in warnings[0]
    assert SERVES not in fallback.log
    assert np.array_equal(fallback.pictures[0], sglangs_own.pictures[0])
