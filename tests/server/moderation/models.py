"""Tiny classifiers with weights set by hand, so that what they say is known."""

import io
from pathlib import Path

import numpy as np
import torch
from PIL import Image

POSITIONS = 128
IMAGE_SIDE = 32

_WORDS = ["a", "red", "fox", "in", "snow", "for", "##bidden", "lewd"]
_VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_WORDS]
_SOUGHT = ["for", "##bidden", "lewd"]
"""One attention head looks for each."""
_HEAD = 8


@torch.no_grad()
def write_text_model(folder: Path, *, multi_label: bool = True) -> Path:
    """A model that reads 128 tokens and finds words wherever they are.

    Args:
        multi_label: toxic for "forbidden", which is two tokens that must both be there, and sexual
            for "lewd", each with a score of its own. Otherwise safe or unsafe, for "lewd" alone.
    """
    # Not when tests are collected: these take seconds to import.
    from transformers import BertConfig, BertForSequenceClassification, BertTokenizer

    model = BertForSequenceClassification(
        BertConfig(
            vocab_size=len(_VOCABULARY),
            hidden_size=len(_SOUGHT) * _HEAD,
            num_hidden_layers=1,
            num_attention_heads=len(_SOUGHT),
            intermediate_size=4,
            max_position_embeddings=POSITIONS,
            problem_type="multi_label_classification" if multi_label else None,
            id2label=dict(enumerate(("toxic", "sexual") if multi_label else ("safe", "unsafe"))),
        )
    )
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("LayerNorm.weight") else 0.0)
    layer = model.bert.encoder.layer[0].attention
    for place, word in enumerate(_SOUGHT):
        head = place * _HEAD
        model.bert.embeddings.word_embeddings.weight[_VOCABULARY.index(word), place] = 1
        # The word gets all attention where it is, and nothing of note does where it is not.
        layer.self.query.bias[head] = 1
        layer.self.key.weight[head, place] = 100
        layer.self.value.weight[head, place] = 1
        layer.output.dense.weight[place, head] = 1
        model.bert.pooler.dense.weight[place, place] = 1
    if multi_label:
        model.classifier.weight[0, :2] = 10
        model.classifier.bias[0] = -15
        model.classifier.weight[1, 2] = 10
        model.classifier.bias[1] = -5
    else:
        model.classifier.weight[1, 2] = 10
        model.classifier.bias[1] = -5
    model.save_pretrained(folder)
    BertTokenizer(vocab={word: i for i, word in enumerate(_VOCABULARY)}).save_pretrained(folder)
    return folder


@torch.no_grad()
def write_image_model(folder: Path) -> Path:
    """A model to which what is bright is nsfw, and which sees the middle square alone."""
    from transformers import CLIPImageProcessor, ResNetConfig, ResNetForImageClassification

    model = ResNetForImageClassification(
        ResNetConfig(
            embedding_size=4,
            hidden_sizes=[4],
            depths=[1],
            layer_type="basic",
            id2label={0: "normal", 1: "nsfw"},
        )
    )
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if name.endswith("normalization.weight") else 0.0)
    # The middle pixel's mean over the colours.
    model.resnet.embedder.embedder.convolution.weight[0, :, 3, 3] = 1 / 3
    model.classifier[1].weight[1, 0] = 20
    model.classifier[1].bias[1] = -10
    model.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIDE},
        crop_size={"height": IMAGE_SIDE, "width": IMAGE_SIDE},
        image_mean=[0.0] * 3,
        image_std=[1.0] * 3,
    ).save_pretrained(folder)
    return folder


def picture(level: int, width: int = 64, height: int = 64, file_format: str = "PNG") -> bytes:
    """A file of one shade, 0 to 255."""
    return encoded(np.full((height, width, 3), level, np.uint8), file_format)


def encoded(pixels: np.ndarray, file_format: str = "PNG") -> bytes:
    Image.fromarray(pixels).save(file := io.BytesIO(), file_format)
    return file.getvalue()
