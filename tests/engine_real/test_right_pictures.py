"""Each prompt gets its own picture, and the right one: the real engine and the trained demo."""

import base64
import json
import socket
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import combinations
from random import Random

import numpy as np
import pytest
from torch import nn

from tests.channel import wait_until
from tests.engine_real.test_krea2_serve import decoded, in_engine, pixels
from tests.server.serving import Served
from tools.demo_model.captions import caption
from tools.demo_model.evaluate import ImageGenerator, Score
from tools.demo_model.judge import Verdict, judge
from tools.demo_model.reading import draw_captions
from tools.demo_model.scene import COLOURS, LEAST_CONTRAST, contrast
from tools.demo_model.shapes import SHAPES
from tools.demo_model.wish import Asked, Wish

SIZES = ((128, 128), (192, 128), (128, 192), (192, 192), (256, 256))
CLIENTS = 16
HEART = Wish(("yellow",), (Asked("heart", "red"),))
RIGHT = Verdict(colour=True, shape=True, background=True)


class Server(ImageGenerator):
    """Generates prompts by asking a server for them, several at a time."""

    def __init__(self, server: Served) -> None:
        self._client = server.client()

    def paint(
        self, dit: nn.Module, prompts: Sequence[str], width: int, height: int, seed: int
    ) -> np.ndarray:
        def ask(number: int) -> np.ndarray:
            return generate(self._client, prompts[number], width, height, seed + number)

        with ThreadPoolExecutor(CLIENTS) as pool:
            return np.stack(list(pool.map(ask, range(len(prompts)))))


def generate(client, prompt: str, width: int, height: int, seed: int, steps: int = 8) -> np.ndarray:
    response = client.images.generate(
        prompt=prompt,
        size=f"{width}x{height}",
        extra_body={"seed": seed, "num_inference_steps": steps},
    )
    return pixels(decoded(response)[0])


def plain_wishes(count: int) -> list[Wish]:
    """Different ones, each a lone shape."""
    every = [
        Wish((behind,), (Asked(shape, colour),))
        for shape in SHAPES
        for colour in COLOURS
        for behind in COLOURS
        if contrast(colour, behind) >= LEAST_CONTRAST
    ]
    return Random(8).sample(every, count)


@pytest.mark.slow
def test_held_out_prompts_get_what_they_ask_for(real_server):
    """200 that training has never seen the like of: lone shapes, several, places, styles."""
    asked = draw_captions(200, Random(2026), held_out=True)
    score = Server(real_server).score(nn.Identity(), asked, SIZES)
    print(score)
    assert score.reaches(Score(colour=0.95, shape=0.85, background=0.95)), score


@pytest.mark.parametrize("count", [8, pytest.param(32, marks=pytest.mark.slow)])
def test_nobody_gets_anothers_picture(real_server, count):
    """All at once, sizes and steps mixed, every fourth hangs up: each gets its own prompt's."""
    wishes = plain_wishes(count)
    asked = [
        (
            caption(wish, Random(number)),
            *SIZES[number % len(SIZES)],
            number,
            6 + 2 * (number // 4 % 4),
        )
        for number, wish in enumerate(wishes)
    ]
    client = real_server.client()
    stay = [number for number in range(count) if number % 4]
    cancelled = real_server.metric("krea2_requests_total", outcome="cancelled")
    with ThreadPoolExecutor(count) as pool:
        answers, gone = {}, []
        for number, its in enumerate(asked):
            if number in stay:
                answers[number] = pool.submit(generate, client, *its)
            else:
                gone.append(pool.submit(hang_up, real_server, *its))
        together = {number: answer.result() for number, answer in answers.items()}
        for hung_up in gone:
            hung_up.result()
    wait_until(lambda: in_engine(real_server) == 0)
    assert real_server.metric("krea2_requests_total", outcome="cancelled") > cancelled
    right = 0
    for number, picture in together.items():
        alone = generate(client, *asked[number])
        # Packed with others tokens round otherwise.
        assert np.abs(picture.astype(int) - alone).max() <= 2, asked[number]
        verdict = judge(picture, wishes[number])
        right += verdict.colour and verdict.background
    assert right >= 0.95 * len(together)


def hang_up(server: Served, prompt: str, width: int, height: int, seed: int, steps: int) -> None:
    """Ask for pictures, wait a bit and go away."""
    fields = {"prompt": prompt, "size": f"{width}x{height}", "seed": seed}
    content = json.dumps({**fields, "num_inference_steps": steps}).encode()
    head = "POST /v1/images/generations HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        connection.sendall(f"{head}content-length: {len(content)}\r\n\r\n".encode() + content)
        time.sleep(0.02 * (seed % 16))


def test_who_asks_for_no_size_gets_one_that_is_generated_well(real_server):
    response = real_server.client().images.generate(
        prompt=caption(HEART, Random(1)), extra_body={"seed": 0}
    )
    assert response.size == "256x256"
    assert judge(pixels(decoded(response)[0]), HEART) == RIGHT


@pytest.mark.parametrize(
    "wish",
    [
        HEART,
        Wish(("blue",), (Asked("circle", "white", "large"),)),
        Wish(("black",), (Asked("square", "green", place="left"),)),
    ],
    ids=lambda wish: wish.asked[0].shape,
)
def test_the_text_wins_over_the_seed(real_server, wish):
    client, prompt = real_server.client(), caption(wish, Random(1))
    pictures = [generate(client, prompt, 192, 192, seed) for seed in range(4)]
    for picture in pictures:
        assert judge(picture, wish) == RIGHT
    for one, other in combinations(pictures, 2):
        assert (one != other).any()


@pytest.mark.parametrize("count", [6, pytest.param(40, marks=pytest.mark.slow)])
def test_previews_at_half_the_steps_have_the_right_colours(real_server, count):
    """The background, which is most of the picture, and the shape's."""
    client, wishes = real_server.client(), plain_wishes(count)

    def preview(number: int) -> np.ndarray:
        stream = client.images.generate(
            prompt=caption(wishes[number], Random(number)),
            size="256x256",
            stream=True,
            partial_images=1,
            extra_body={"seed": number},
        )
        partial, _ = list(stream)
        assert partial.model_extra["step"] == 4  # of 8
        return pixels(base64.b64decode(partial.b64_json))

    with ThreadPoolExecutor(CLIENTS) as pool:
        pictures = list(pool.map(preview, range(len(wishes))))
    verdicts = [judge(picture, wish) for picture, wish in zip(pictures, wishes, strict=True)]
    score = Score.of(verdicts)
    assert score.reaches(Score(colour=0.8, shape=0.0, background=0.8)), score
