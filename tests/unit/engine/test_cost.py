import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from krea2_srt.engine.cost import CostModel, Sample, fit, fit_line, roofline

H200 = roofline()
TRUE = CostModel(floor=0.0, launch=3.0, per_token=0.04, per_square=2e-6)
PACKS = [(320,), (1088,), (4160,), (320,) * 8, (4160, 320), (16448,), (1088,) * 3, (64, 64)]

settings_of_packs = st.lists(
    st.lists(st.integers(1, 20000), min_size=1, max_size=8).map(tuple), min_size=1, max_size=12
)


def samples_of(cost: CostModel, packs=PACKS, noise: float = 0.0, seed: int = 0) -> list[Sample]:
    generator = random.Random(seed)
    return [
        Sample(branches, cost.step(branches) * generator.uniform(1 - noise, 1 + noise))
        for branches in packs
    ]


@pytest.mark.parametrize(
    ("side", "floor_ms"), [(256, 9.9), (512, 34.5), (1024, 143.0), (2048, 742.0)]
)
def test_the_roofline_gives_the_floors_of_the_design(side, floor_ms):
    tokens = (side // 16) ** 2 + 64
    assert H200.step([tokens]) == pytest.approx(floor_ms, rel=0.02)


def test_a_step_takes_at_least_the_reading_of_the_weights():
    assert H200.step([16]) == pytest.approx(24.3e9 / 4.3e12 * 1e3)
    assert H200.step([16]) == H200.step([16, 16])


def test_attention_costs_by_branch_and_not_by_pack():
    together = H200.step([4160, 4160])
    assert together == pytest.approx(2 * H200.step([4160]))
    assert together < H200.step([8320])


def test_a_forward_is_a_step_from_sums():
    branches = (320, 1088, 1029)
    assert TRUE.forward(sum(branches), sum(n * n for n in branches)) == TRUE.step(branches)


@pytest.mark.parametrize("machine", ["fast", "slow"])
def test_rooflines_scale_with_the_machine(machine):
    factor = {"fast": 2.0, "slow": 0.5}[machine]
    cost = roofline(790e12 * factor, 4.3e12 * factor)
    for branches in PACKS:
        assert cost.step(branches) == pytest.approx(H200.step(branches) / factor)
    assert cost.encode(64) == pytest.approx(H200.encode(64) / factor)


def test_decodes_cost_by_pixels_and_encodes_by_tokens():
    cost = CostModel(
        0, 0, 1, 0, encode_launch=2, encode_per_token=3, decode_launch=5, decode_per_pixel=7
    )
    assert cost.encode(10) == 32
    assert cost.decode(10) == 75


def test_a_fit_finds_the_coefficients_exactly():
    fitted = fit(samples_of(TRUE), H200)
    assert fitted.launch == pytest.approx(TRUE.launch, rel=1e-6)
    assert fitted.per_token == pytest.approx(TRUE.per_token, rel=1e-6)
    assert fitted.per_square == pytest.approx(TRUE.per_square, rel=1e-6)
    assert fitted.floor == 0.0


@pytest.mark.parametrize("seed", range(5))
def test_a_fit_predicts_within_the_noise_of_its_samples(seed):
    fitted = fit(samples_of(TRUE, PACKS * 4, noise=0.05, seed=seed), H200)
    for branches in PACKS:
        assert fitted.step(branches) == pytest.approx(TRUE.step(branches), rel=0.05)
    assert fitted.per_token == pytest.approx(TRUE.per_token, rel=0.1)
    assert fitted.per_square == pytest.approx(TRUE.per_square, rel=0.15)


def test_small_and_large_packs_count_alike_in_a_fit():
    # One sample is 10 % off: by absolute errors the large one would bend all the others.
    samples = samples_of(TRUE, [(64,), (128,), (320,), (640,), (1088,), (2176,), (4160,)])
    fitted = fit([*samples, Sample((32768,), 1.1 * TRUE.step([32768]))], H200)
    assert fitted.step([64]) == pytest.approx(TRUE.step([64]), rel=0.05)


def test_a_fit_keeps_what_it_does_not_measure():
    fitted = fit(samples_of(TRUE), H200)
    assert fitted.blocks == H200.blocks
    assert fitted.encode(64) == H200.encode(64)
    assert fitted.decode(4096) == H200.decode(4096)


@given(settings_of_packs, st.randoms(use_true_random=False))
def test_no_coefficient_is_negative(packs, generator):
    fitted = fit([Sample(branches, generator.uniform(0.01, 1000.0)) for branches in packs], H200)
    assert min(fitted.floor, fitted.launch, fitted.per_token, fitted.per_square) >= 0
    assert fitted.step([320]) > 0


def test_a_falling_time_is_fitted_by_a_constant():
    samples = [Sample((tokens,), 20.0 - tokens / 1000) for tokens in (1000, 2000, 4000, 8000)]
    fitted = fit(samples, H200)
    assert (fitted.per_token, fitted.per_square) == (0.0, 0.0)
    assert 12.0 < fitted.launch < 19.0


@pytest.mark.parametrize("packs", [[(4160,)], [(4160,)] * 9, [(4160,), (320,)]])
def test_few_different_packs_keep_the_proportions_of_the_prior(packs):
    slower = [Sample(branches, 2.5 * H200.step(branches)) for branches in packs]
    fitted = fit(slower, H200)
    for branches in (*PACKS, (16,)):
        assert fitted.step(branches) == pytest.approx(2.5 * H200.step(branches))


def test_three_different_packs_are_enough():
    fitted = fit(samples_of(TRUE, [(320,), (4160,), (16448,)]), H200)
    assert fitted.step([1088]) == pytest.approx(TRUE.step([1088]))


@pytest.mark.parametrize("samples", [[], [Sample((320,), 0.0)], [Sample((320,), float("nan"))]])
def test_samples_without_time_are_refused(samples):
    with pytest.raises(ValueError, match="must be positive"):
        fit(samples, H200)


def test_a_line_is_fitted_exactly_and_never_falls():
    assert fit_line([(100, 7.0), (200, 9.0), (400, 13.0)]) == pytest.approx((5.0, 0.02))
    offset, slope = fit_line([(100, 9.0), (200, 7.0)])
    assert slope == 0.0
    assert 7.0 <= offset <= 9.0
    offset, slope = fit_line([(100, 1.0), (200, 3.0)])
    assert offset == 0.0
    assert slope > 0


@pytest.mark.parametrize("points", [[], [(1, 1.0)], [(1, 1.0), (2, 0.0)]])
def test_a_line_needs_two_points_with_time(points):
    with pytest.raises(ValueError, match="two points"):
        fit_line(points)


@given(st.floats(0.01, 1e6), st.floats(0.01, 1e6))
def test_slices_are_at_least_one_block_and_as_large_as_a_turn_allows(step_ms, max_turn_ms):
    blocks = H200.blocks_per_slice(step_ms, max_turn_ms)
    assert 1 <= blocks <= H200.blocks
    block_ms = step_ms / H200.blocks
    if blocks > 1:
        assert blocks * block_ms <= max_turn_ms * (1 + 1e-9)
    if blocks < H200.blocks:
        assert (blocks + 1) * block_ms > max_turn_ms * (1 - 1e-9)


def test_a_step_as_long_as_a_turn_is_not_cut():
    assert H200.blocks_per_slice(200.0, 200.0) == 28
    assert H200.blocks_per_slice(200.1, 200.0) == 27
    assert H200.blocks_per_slice(742.0, 200.0) == 7
    assert H200.blocks_per_slice(1e6, 200.0) == 1
