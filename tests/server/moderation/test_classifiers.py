"""What models are shown, and what is made of what they say."""

import itertools
import shutil

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from krea2_server.moderation.classifiers import (
    OVERLAP,
    ImageClassifier,
    TextClassifier,
    UnusableDeviceError,
    UnusableModelError,
    views,
)
from tests.server.moderation.models import POSITIONS, encoded, picture, write_text_model

WORDS = ["a", "red", "fox", "in", "snow"]
MOST_CHARACTERS = 32_000


@pytest.fixture(scope="module")
def texts(text_model):
    return TextClassifier(str(text_model), "cpu")


@pytest.fixture(scope="module")
def images(image_model):
    return ImageClassifier(str(image_model), "cpu")


@pytest.fixture(scope="module")
def tokenizer(text_model):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(text_model)


def highest(classifier, content):
    return {
        label: max(scores[label] for scores in classifier.scores(content))
        for label in classifier.labels
    }


def test_a_model_reads_what_its_own_tokenizer_makes_of_a_text(texts, tokenizer):
    text = "A forbidden fox in the snow"
    assert texts.windows(text) == [dict(tokenizer(text))]


@given(st.integers(1, 900))
def test_every_passage_of_a_quarter_window_is_whole_in_a_window(texts, tokenizer, length):
    text = " ".join(WORDS[i * i % len(WORDS)] for i in range(length))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    windows = [window["input_ids"][1:-1] for window in texts.windows(text)]
    assert all(len(window) <= POSITIONS - 2 for window in windows)
    # Put back together where they overlap, they are the text.
    overlap = int((POSITIONS - 2) * OVERLAP)
    joined = windows[0]
    for window in windows[1:]:
        assert joined[-overlap:] == window[:overlap]
        joined = joined + window[overlap:]
    assert joined == whole


def test_a_phrase_is_found_wherever_it_is_in_the_longest_prompt(texts):
    words = ["fox"] * (MOST_CHARACTERS // len("fox "))
    assert highest(texts, " ".join(words))["toxic"] < 0.01
    for place in (0, len(words) // 2, len(words) - 3):
        # As long as three foxes.
        prompt = " ".join([*words[:place], "forbidden .", *words[place + 3 :]])
        assert len(prompt) == MOST_CHARACTERS - 1
        assert highest(texts, prompt)["toxic"] > 0.9, place


def test_a_phrase_is_found_across_the_end_of_a_window(texts):
    # Windows of 126 tokens begin every 95; the phrase is two.
    for window in range(3):
        for place in range(window * 95 + 124, window * 95 + 128):
            prompt = "fox " * place + "forbidden " + "fox " * 300
            assert highest(texts, prompt)["toxic"] > 0.9, place


def test_labels_of_their_own_have_scores_of_their_own(texts):
    scores = highest(texts, "a forbidden lewd fox")
    assert scores["toxic"] > 0.9
    assert scores["sexual"] > 0.9


def test_labels_that_exclude_each_other_share_one(tmp_path):
    model = TextClassifier(str(write_text_model(tmp_path, multi_label=False)), "cpu")
    (scores,) = model.scores("a lewd fox")
    assert scores["unsafe"] > 0.9
    assert sum(scores.values()) == pytest.approx(1)


@pytest.mark.parametrize("file_format", ["PNG", "JPEG", "WEBP"])
def test_images_of_all_formats(images, file_format):
    assert highest(images, picture(230, file_format=file_format))["nsfw"] > 0.9
    assert highest(images, picture(30, file_format=file_format))["nsfw"] < 0.1


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("place", [0, 48, 96, 144])
def test_no_part_of_a_long_image_is_cut_off(images, place, upright):
    # The model sees the middle third of a 3:1 image, and nothing else.
    pixels = np.zeros((64, 192, 3), np.uint8)
    pixels[:, place : place + 48] = 255
    image = encoded(np.ascontiguousarray(pixels.transpose(1, 0, 2)) if upright else pixels)
    assert highest(images, image)["nsfw"] > 0.9


@given(st.integers(16, 4096), st.integers(16, 4096))
def test_views_cover_an_image_and_overlap_by_half(width, height):
    whole, *squares = views(width, height)
    assert whole == (0, 0, width, height)
    side = min(width, height)
    axis = 0 if width > height else 1
    assert all(box[2] - box[0] == box[3] - box[1] == side for box in squares)
    if squares:
        assert squares[0][axis] == 0
        assert squares[-1][axis + 2] == max(width, height)
    for first, second in itertools.pairwise(squares):
        assert second[axis] - first[axis] <= side / 2 + 1


def copy_of(model, folder):
    return shutil.copytree(model, folder / "copy")


def test_weights_that_are_not_there_are_not_made_up(text_model, tmp_path):
    folder = copy_of(text_model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    save_file(
        {name: value for name, value in weights.items() if "classifier" not in name},
        folder / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(UnusableModelError, match=r"missing_keys: classifier\.bias"):
        TextClassifier(str(folder), "cpu")


def test_pickled_weights_are_not_read(text_model, tmp_path):
    folder = copy_of(text_model, tmp_path)
    from transformers import BertForSequenceClassification

    weights = BertForSequenceClassification.from_pretrained(text_model).state_dict()
    torch.save(weights, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        TextClassifier(str(folder), "cpu")


def test_scores_that_are_no_numbers_are_none(text_model, tmp_path):
    folder = copy_of(text_model, tmp_path)
    weights = load_file(folder / "model.safetensors")
    weights["classifier.bias"][0] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(FloatingPointError):
        list(TextClassifier(str(folder), "cpu").scores("a fox"))


def test_a_device_that_is_not_there(text_model):
    with pytest.raises(UnusableDeviceError, match="abacus"):
        TextClassifier(str(text_model), "abacus")
