"""The prompts that come with the load tester, and the plans drawn from them."""

from collections import Counter

import numpy as np
import pytest

from krea2_bench.arrivals import constant, gamma
from krea2_bench.load.mix import Kind, parse_mix, shares
from krea2_bench.load.plan import at_rate, draw_plan
from krea2_bench.load.prompts import bundled_prompts, draw_prompt, nearest_prompt


def test_there_are_hundreds_in_several_languages_of_all_lengths():
    prompts = bundled_prompts()
    assert len({prompt.text for prompt in prompts}) == len(prompts) > 300
    languages = Counter(prompt.language for prompt in prompts)
    assert len(languages) > 10
    assert min(languages.values()) > 20
    tokens = [prompt.tokens for prompt in prompts]
    assert tokens[0] == 3
    assert 480 < tokens[-1] <= 500
    for low, high in ((3, 10), (10, 30), (30, 77), (77, 150), (150, 300), (300, 500)):
        assert sum(low <= count <= high for count in tokens) >= 10


def test_their_tokens_are_those_of_the_models_tokenizer(demo_model):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model / "tokenizer")
    prompts = bundled_prompts()
    found = tokenizer([prompt.text for prompt in prompts], add_special_tokens=False)["input_ids"]
    assert [len(ids) for ids in found] == [prompt.tokens for prompt in prompts]


def test_prompts_are_drawn_by_length():
    rng = np.random.default_rng(0)
    assert {3 <= draw_prompt((3, 9), rng).tokens <= 9 for _ in range(50)} == {True}
    assert len({draw_prompt((0, 512), rng).text for _ in range(100)}) > 70
    assert nearest_prompt(10_000, rng).tokens == bundled_prompts()[-1].tokens


@pytest.mark.parametrize("count", [1, 7, 14, 100])
def test_every_kind_has_its_share(count):
    mix = parse_mix("64x64:weight=11, 128x128:weight=2, 256x256:weight=1")
    found = shares(mix, count)
    assert sum(found) == count
    for kind, number in zip(mix, found, strict=True):
        assert abs(number - count * kind.weight / 14) < 1


def test_plans_are_the_same_for_the_same_seed_and_number():
    mix = parse_mix("64x64:weight=3, 128x128:n=4")
    plan = draw_plan(mix, 40, 7, 0.5, 1.0)
    assert draw_plan(mix, 40, 7, 0.5, 1.0) == plan
    other = draw_plan(mix, 40, 7, 0.5, 1.0, number=1)
    assert [p.kind for p in other] == [p.kind for p in plan]
    assert [p.hang_up_s for p in other] == [p.hang_up_s for p in plan]
    assert not {p.seed for p in other} & {p.seed for p in plan}
    images = [p.seed + i for p in plan for i in range(p.kind.n)]
    assert len(set(images)) == len(images)
    assert 10 <= sum(p.hang_up_s is not None for p in plan) <= 30


def test_times_of_arrival_have_their_rate_and_burstiness():
    rng = np.random.default_rng(0)
    for burstiness in (0.25, 1.0, 4.0):
        gaps = np.diff(gamma(100_000, 5.0, rng, burstiness))
        assert gaps.mean() == pytest.approx(0.2, rel=0.03)
        assert gaps.std() / gaps.mean() == pytest.approx(burstiness**-0.5, rel=0.03)
    assert constant(3, 2.0).tolist() == [0, 0.5, 1.0]


def test_a_higher_rate_brings_the_same_requests_closer_together():
    plan = draw_plan([Kind(64, 64)], 50, 0)
    slow, fast = (at_rate(plan, rate, "poisson", 1.0, 3) for rate in (1.0, 4.0))
    assert [p.due_s for p in slow] == pytest.approx([4 * p.due_s for p in fast])
    assert [p.due_s for p in slow] == sorted(p.due_s for p in slow)
    assert [p.prompt for p in slow] == [p.prompt for p in fast]
    assert {p.due_s for p in at_rate(plan, float("inf"), "poisson", 1.0, 3)} == {0.0}
