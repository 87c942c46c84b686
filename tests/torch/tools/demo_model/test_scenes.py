"""Scenes, captions, and the judge that compares them."""

from collections import Counter
from random import Random

import numpy as np
import pytest

from tools.demo_model.captions import caption
from tools.demo_model.judge import judge, look
from tools.demo_model.scene import COLOURS, Scene, Thing
from tools.demo_model.shapes import SHAPES
from tools.demo_model.wish import PLACES, Asked, Wish, draw_wish

SIZES = [(64, 64), (96, 64), (96, 96), (128, 128), (128, 192), (256, 256)]


def one(shape="circle", colour="red", background=("white",), **asked) -> Wish:
    return Wish(background, (Asked(shape, colour, **asked),))


def size_for(wish: Wish, random: Random) -> tuple[int, int]:
    return random.choice([size for size in SIZES if wish.fits(*size)])


def test_the_judge_is_right_about_scenes_themselves():
    random, right, count = Random(11), Counter(), 400
    for _ in range(count):
        wish = draw_wish(random)
        verdict = judge(wish.grant(*size_for(wish, random), random).draw(), wish)
        right.update(k for k, v in vars(verdict).items() if v)
    assert {k: v / count for k, v in right.items()} == {
        k: pytest.approx(1, abs=0.01) for k in ("colour", "shape", "background")
    }


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("other", SHAPES)
def test_the_judge_tells_shapes_apart(shape, other):
    for style in ("plain", "outline", "striped", "dotted"):
        style = "plain" if shape == "ring" else style
        picture = Scene(96, 96, ("white",), (Thing(shape, "blue", style, 48, 48, 28),)).draw()
        assert judge(picture, one(other, "blue")).shape == (shape == other), style


def test_the_judge_sees_what_is_wrong():
    random = Random(0)
    picture = one().grant(96, 96, random).draw()
    assert vars(judge(picture, one())) == {"colour": True, "shape": True, "background": True}
    assert not judge(picture, one(colour="blue")).colour
    assert not judge(picture, one(background=("yellow",))).background
    assert not judge(picture, one(background=("white", "blue"))).background
    assert not judge(picture, one(count=2)).colour  # one is missing
    two = one(count=2).grant(128, 96, random).draw()
    assert not judge(two, one()).colour  # one too many
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    assert not judge(noise, one()).shape


def test_the_judge_of_colours_does_not_mind_the_shape():
    picture = one("square").grant(96, 96, Random(0)).draw()
    verdict = judge(picture, one("circle"))
    assert verdict.colour
    assert not verdict.shape


@pytest.mark.parametrize("place", PLACES)
def test_shapes_stand_where_they_are_asked_to(place):
    random = Random(4)
    for _ in range(10):
        (seen,) = look(one(size="small", place=place).grant(128, 128, random).draw()).things
        across, along = PLACES[place]
        assert abs(seen.x - (0.2 + 0.6 * across)) < 0.22
        assert abs(seen.y - (0.2 + 0.6 * along)) < 0.22


@pytest.mark.parametrize(
    ("relation", "axis", "before"),
    [("left of", "x", True), ("right of", "x", False), ("above", "y", True), ("below", "y", False)],
)
def test_two_shapes_stand_as_they_are_asked_to(relation, axis, before):
    wish = Wish(("white",), (Asked("circle", "red"), Asked("square", "blue")), relation)
    random = Random(5)
    for size in filter(lambda size: wish.fits(*size), SIZES):
        things = {thing.colour: thing for thing in look(wish.grant(*size, random).draw()).things}
        assert (getattr(things["red"], axis) < getattr(things["blue"], axis)) == before


def test_nothing_is_cut_off_and_nothing_covers_another():
    random = Random(6)
    for _ in range(300):
        wish = draw_wish(random)
        width, height = size_for(wish, random)
        scene = wish.grant(width, height, random)
        for thing in scene.things:
            assert 0 <= thing.x - thing.radius < thing.x + thing.radius <= width
            assert 0 <= thing.y - thing.radius < thing.y + thing.radius <= height
        for one_, other in zip(scene.things, scene.things[1:], strict=False):
            apart = max(abs(one_.x - other.x), abs(one_.y - other.y))
            assert apart >= one_.radius + other.radius


def test_the_same_seed_makes_the_same_captions_and_pictures():
    def made(seed):
        random = Random(seed)
        wishes = [draw_wish(random) for _ in range(20)]
        texts = [caption(wish, random) for wish in wishes]
        return texts, [wish.grant(64, 64, random).draw().tobytes() for wish in wishes]

    assert made(1) == made(1)
    assert made(1) != made(2)


def test_captions_say_all_that_is_asked_for():
    random = Random(0)
    wish = Wish(
        ("yellow", "black"),
        (Asked("heart", "red", "large", "striped"), Asked("star", "white")),
        "above",
    )
    texts = {caption(wish, random) for _ in range(200)}
    assert len(texts) > 50
    for text in texts:
        assert text.lower().index("heart") < text.lower().index("star")
        assert text.lower().index("yellow") < text.lower().index("black")


def test_held_out_combinations_are_some_of_each_colour():
    held = {
        colour: sum(one(shape, colour, (b,)).held_out for shape in SHAPES for b in COLOURS)
        for colour in COLOURS
    }
    assert sum(held.values()) == pytest.approx(len(SHAPES) * len(COLOURS) ** 2 / 10, rel=0.3)
    assert min(held.values()) > 0
