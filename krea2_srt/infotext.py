"""A request as the text that A1111 writes into its files, which viewers of such files read.

A prompt, then what guidance steers away from, then one line of settings. ``CFG scale`` counts as
A1111 does, 1 being off; ``Guidance scale`` is Krea's, as this server's requests have it.
"""

import json

from krea2_srt import __version__
from krea2_srt.request import ImageRequest

_NEGATIVE = "Negative prompt:"


def infotext(image: ImageRequest, model: str) -> str:
    """What generates this image again; nothing where the model has no name.

    Args:
        image: a request for one image.
        model: what clients call it.
    """
    if not model:
        return ""
    settings = {
        "Steps": str(image.steps),
        "Sampler": "Euler",
        "CFG scale": f"{image.guidance + 1:.10g}",
        "Seed": str(image.seed),
        "Size": image.size,
        "Model": _quoted(model),
        "Guidance scale": repr(float(image.guidance)),
        "Version": f"krea2-srt {__version__}",
    }
    uses = sorted(image.adapters, key=lambda use: (use.name, use.digest))
    # As A1111's prompts name them, for who sends it again.
    prompt = image.prompt + "".join(f" <lora:{use.name}:{use.scale!r}>" for use in uses)
    lines = [prompt]
    if image.negative_prompt:
        lines.append(f"{_NEGATIVE} {image.negative_prompt}")
    if image.mu is not None:
        settings["Mu"] = repr(image.mu)
    if uses:
        # Twelve digits are what A1111 calls a hash of an adapter.
        hashes = ", ".join(f"{use.name}: {use.digest[:12]}" for use in uses)
        scales = ", ".join(f"{use.name}: {use.scale!r}" for use in uses)
        settings["Lora hashes"] = json.dumps(hashes, ensure_ascii=False)
        settings["Lora scales"] = json.dumps(scales, ensure_ascii=False)
    prompts = {"Prompt": prompt, "Negative prompt": image.negative_prompt}
    if not all(map(_is_read_as_it_is, prompts.values())):
        # Settings of these names come later for A1111, and count.
        settings |= {name: json.dumps(text, ensure_ascii=False) for name, text in prompts.items()}
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def _is_read_as_it_is(prompt: str) -> bool:
    """Whether readers keep it: they trim each line, and end the prompt at one with the mark."""
    lines = [line.strip() for line in prompt.split("\n")]
    return prompt == "\n".join(lines).strip() and not any(
        line.startswith(_NEGATIVE) for line in lines
    )


def _quoted(value: str) -> str:
    """A value of a setting, in which commas, colons and line ends would end it."""
    return json.dumps(value, ensure_ascii=False) if set(value) & set(",:\n") else value
