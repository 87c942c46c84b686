"""What a tensor of an adapter's file is, by the ending of its key."""

import re

from krea2_srt.errors import AdapterError

_NAMED = r"(?:\.[\w-]+)?\.weight"
"""PEFT can put an adapter's name before the ending, as in ``lora_A.default.weight``."""

_READ: tuple[tuple[str, str], ...] = (
    (rf"(?:\.(?:lora_A|lora_down|lora\.down|lora_linear_layer\.down)|_lora\.down){_NAMED}", "down"),
    (rf"(?:\.(?:lora_B|lora_up|lora\.up|lora_linear_layer\.up)|_lora\.up){_NAMED}", "up"),
    (r"\.lora_A", "down"),
    (r"\.lora_B", "up"),
    (r"\.alpha", "alpha"),
    (r"\.lokr_w1", "lokr_w1"),
    (r"\.lokr_w1_a", "lokr_w1_a"),
    (r"\.lokr_w1_b", "lokr_w1_b"),
    (r"\.lokr_w2", "lokr_w2"),
    (r"\.lokr_w2_a", "lokr_w2_a"),
    (r"\.lokr_w2_b", "lokr_w2_b"),
)

_REFUSED: tuple[tuple[str, str], ...] = (
    (r"\.dora_scale|\.lora_magnitude_vector(\..*)?", "of a DoRA; only plain LoRA is read"),
    (r"\.hada_\w+", "of a LoHa; only LoRA and LoKr are read"),
    (r"\.(lora_mid\.weight|lokr_t2)", "of a convolution; this model has none"),
    (r"\.diff", "a difference of weights, not a LoRA"),
    (r"\.(diff_b|lora_(A|B|up|down)(\.[\w-]+)?\.bias)", "a difference of biases, not a LoRA"),
    (r"\.set_weight", "a weight in place of the model's, not a LoRA"),
    (r"\.reshape_weight", "another shape for a weight, not a LoRA"),
    (r"\.(w_norm|b_norm)", "a difference of a norm, not a LoRA"),
    (r"\.(b?oft_\w+|oft_R(\..*)?)", "of an OFT; only LoRA and LoKr are read"),
    (r"\.[ab][12]\.weight", "of a GLoRA; only LoRA and LoKr are read"),
    (r"\.(on_input|ia3_l(\..*)?)", "of an (IA)³; only LoRA and LoKr are read"),
    (r"\.lora_embedding_[AB](\..*)?", "of an embedding; this model has none"),
)

_ENCODER = re.compile(
    r"(base_model\.model\.)?"
    r"(lora_te|te\d?[._]|text_encoders?[._]|lycoris_text_encoder|conditioner\.|cond_stage_model\.|"
    r"clip_|bundle_emb|emb_params)"
)
_VAE = re.compile(r"(lora_)?(vae|first_stage_model)[._]")
_WEIGHTS = re.compile(r".+\.(weight|bias|scale|lin|scale_shift_table)")

_LONGEST = 200
"""Characters of a key that are shown: those of a hostile file are of any length."""


def shown(text: str) -> str:
    """A text from outside, in one line."""
    cut = text if len(text) <= _LONGEST else text[:_LONGEST] + "…"
    return cut if cut.isprintable() else repr(cut)


def split_key(key: str) -> tuple[str, str]:
    """A key's module as the trainer calls it, and the tensor's role in it.

    Roles are ``down``, ``up``, ``alpha`` and ``lokr_...``.

    Raises:
        AdapterError: the key, and what it is: nothing that is read here.
    """
    if _ENCODER.match(key):
        raise AdapterError(f"{shown(key)} is of a text encoder; only the transformer is adapted")
    if _VAE.match(key):
        raise AdapterError(f"{shown(key)} is of a VAE; only the transformer is adapted")
    for ending, what in _REFUSED:
        if re.fullmatch(rf".+?(?:{ending})", key, re.DOTALL):
            raise AdapterError(f"{shown(key)} is {what}")
    for ending, role in _READ:
        if match := re.fullmatch(rf"(.+?)(?:{ending})", key, re.DOTALL):
            return match[1], role
    if _WEIGHTS.fullmatch(key):
        raise AdapterError(f"{shown(key)} is a weight itself, not a LoRA; is this a checkpoint?")
    raise AdapterError(
        f"{shown(key)} is not understood; a LoRA's keys end in .lora_A.weight and .lora_B.weight, "
        f".lora_down.weight and .lora_up.weight, or .alpha"
    )
