"""What a client asks for, and the limits within which it may ask."""

import math
import re
from dataclasses import dataclass, replace

from krea2_srt.errors import RequestError
from krea2_srt.setting import check_settings, setting

SIZE_MULTIPLE = 16
"""Widths and heights are multiples of this many pixels: the VAE's 8 times the DiT's patch of 2."""

MAX_TEXT_TOKENS = 512
"""Tokens of the longest context, the template's suffix included; longer prompts are cut."""

SUFFIX_TOKENS = 5
"""Tokens that the prompt template adds to the context."""

MAX_SEED = 2**63 - 1
"""Largest seed of a request; its further images count on from there."""

MAX_ADAPTERS = 4
"""The most of one image."""

MAX_ADAPTER_SCALE = 10.0
"""Adapters at a larger scale, or at less than its negative, leave nothing of a picture."""

_ADAPTER = r"\w[\w .()+&'=~@#!\[\]-]{0,126}(?<![ .])"
_ADAPTER_NAME = re.compile(rf"(?:{_ADAPTER}/)?{_ADAPTER}")

ADAPTER_NAMES = "1 to 127 letters, digits, spaces and . _ - + ( ), after one folder's name at most"
"""What `is_adapter_name` takes, for errors."""

_ABSURD_SIDE = 100_000
"""Pixels of a side that nobody means."""

MU_RANGE = (-10.0, 10.0)
"""Timestep shifts beyond this are typing errors: at 10 all steps but the last do nothing."""


@dataclass(frozen=True)
class RequestLimits:
    """The largest request that is accepted. All but the last are settings of the engine too."""

    max_side: int = setting(4096, "pixels of an image's longer side", above=0)
    max_pixels: int = setting(
        2048 * 2048,
        "width times height of an image, which the model is meant for up to 2048x2048",
        above=0,
    )
    max_steps: int = setting(200, "denoising steps of an image", above=0)
    max_images: int = setting(64, "images of one request, whoever asks", above=0)
    max_guidance: float = setting(
        100.0, "largest guidance scale, Krea's; 0 allows no guidance", least=0
    )
    max_prompt: int = setting(
        65_536, "characters of a prompt; the model reads the first 512 tokens", above=0
    )

    def __post_init__(self) -> None:
        check_settings(self)


@dataclass(frozen=True)
class AdapterChoice:
    """An adapter that a client asks for, by the name under which it is served.

    Attributes:
        name: see `krea2_srt.lora.names`.
        scale: see `AdapterUse`; None is the adapter's own default.
    """

    name: str
    scale: float | None = None


@dataclass(frozen=True)
class AdapterUse:
    """An adapter that an image is generated with.

    Attributes:
        name: what it is called.
        digest: SHA-256 of what it is; see `krea2_srt.lora.adapter.Adapter`.
        scale: 1 is as it was trained, 0 the base model.
    """

    name: str
    digest: str
    scale: float = 1.0


@dataclass(frozen=True)
class ImageRequest:
    """One request: ``num_images`` sequences with seeds seed, seed + 1, ...

    Attributes:
        prompt: what to generate.
        width, height: pixels, multiples of 16.
        steps: denoising steps.
        guidance: v = cond + guidance * (cond - uncond); 0 is off.
        negative_prompt: what guidance steers away from; unused without guidance.
        seed: of the first image.
        num_images: sequences to run.
        mu: timestep shift; None takes the checkpoint's own.
        adapters: those that are added up. A set, since SGLang's channel makes tuples anew and puts
            them back, which what is frozen does not take.
    """

    prompt: str
    width: int
    height: int
    steps: int
    guidance: float = 0.0
    negative_prompt: str = ""
    seed: int = 0
    num_images: int = 1
    mu: float | None = None
    adapters: frozenset[AdapterUse] = frozenset()

    @property
    def size(self) -> str:
        return f"{self.width}x{self.height}"

    @property
    def prompts(self) -> tuple[str, ...]:
        """One for each of its branches: the prompt, and under guidance the negative prompt."""
        return (self.prompt, self.negative_prompt) if self.guidance else (self.prompt,)

    @property
    def estimated_tokens(self) -> tuple[int, ...]:
        """Tokens of each of its branches, before the prompts are tokenized."""
        return tuple(estimated_text_tokens(prompt) + self.image_tokens for prompt in self.prompts)

    @property
    def seeds(self) -> list[int]:
        """Those of its images; behind the largest comes 0, so that each can be asked for."""
        return [(self.seed + index) % (MAX_SEED + 1) for index in range(self.num_images)]

    def singles(self) -> "list[ImageRequest]":
        """A request for one image for each of its images."""
        return [replace(self, seed=seed, num_images=1) for seed in self.seeds]

    @property
    def image_tokens(self) -> int:
        """Image tokens of one sequence."""
        return (self.width // SIZE_MULTIPLE) * (self.height // SIZE_MULTIPLE)

    def check(self, limits: RequestLimits) -> None:
        """Check every field before anything is computed.

        Raises:
            RequestError: naming the first field that is wrong.
        """
        _check_text("prompt", self.prompt, limits.max_prompt)
        _check_text("negative_prompt", self.negative_prompt, limits.max_prompt)
        for field, least, most in (
            ("width", SIZE_MULTIPLE, limits.max_side),
            ("height", SIZE_MULTIPLE, limits.max_side),
            ("steps", 1, limits.max_steps),
            ("num_images", 1, limits.max_images),
            ("seed", 0, MAX_SEED),
        ):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool):
                raise RequestError(field, f"must be a whole number, got {value!r}")
            if not least <= value <= most:
                raise RequestError(field, f"must be between {least} and {most}, got {value}")
        for field in ("width", "height"):
            if getattr(self, field) % SIZE_MULTIPLE:
                raise RequestError(
                    field, f"must be a multiple of {SIZE_MULTIPLE}, got {getattr(self, field)}"
                )
        if self.width * self.height > limits.max_pixels:
            raise RequestError(
                "width",
                f"{self.width}x{self.height} has {self.width * self.height} pixels, "
                f"the limit is {limits.max_pixels}",
            )
        check_number("guidance", self.guidance, 0.0, limits.max_guidance)
        if self.mu is not None:
            check_number("mu", self.mu, *MU_RANGE)
        _check_adapters(self.adapters, AdapterUse)


def estimated_text_tokens(prompt: str) -> int:
    """Tokens of a prompt's context, before it is tokenized."""
    # Four bytes to a token, within a third, in most languages.
    return min(MAX_TEXT_TOKENS, SUFFIX_TOKENS + len(prompt.encode(errors="replace")) // 4)


def _check_text(field: str, value: object, most: int) -> None:
    if not isinstance(value, str):
        raise RequestError(field, f"must be text, got {type(value).__name__}")
    if len(value) > most:
        raise RequestError(field, f"must have at most {most} characters, got {len(value)}")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise RequestError(field, f"is not valid Unicode text: {error.reason}") from None


def check_number(field: str, value: object, least: float, most: float) -> None:
    """Check that a request's number is finite and in range.

    Raises:
        RequestError: it is not.
    """
    # A whole number may be larger than any float.
    if (
        not isinstance(value, (int, float))
        or isinstance(value, bool)
        or (isinstance(value, float) and not math.isfinite(value))
    ):
        raise RequestError(field, f"must be a finite number, got {value!r}")
    if isinstance(value, int) and abs(value) > 10**15:
        raise RequestError(field, f"must be between {least:g} and {most:g}")
    if not least <= value <= most:
        raise RequestError(field, f"must be between {least:g} and {most:g}, got {value:g}")


def check_choices(choices: frozenset[AdapterChoice]) -> None:
    """Check the adapters that are asked for by name.

    Raises:
        RequestError: naming what is wrong.
    """
    _check_adapters(choices, AdapterChoice)
    names = [choice.name for choice in choices]
    for name in names:
        if not isinstance(name, str) or names.count(name) > 1:
            raise RequestError("adapters", f"must be different names, got {names}")


def _check_adapters(
    adapters: frozenset[AdapterUse] | frozenset[AdapterChoice],
    kind: type[AdapterUse] | type[AdapterChoice],
) -> None:
    if not isinstance(adapters, frozenset) or not all(isinstance(one, kind) for one in adapters):
        raise RequestError("adapters", f"must be a frozenset of {kind.__name__}")
    if len(adapters) > MAX_ADAPTERS:
        raise RequestError("adapters", f"must be at most {MAX_ADAPTERS}, got {len(adapters)}")
    for one in adapters:
        if one.scale is not None or kind is AdapterUse:
            check_scale("adapters", one.name, one.scale)


def inner_name(name: str, path: str) -> str:
    """The name in its folder of an adapter that is served under a name.

    Args:
        name: under which.
        path: of its file or folder there; "" is where its name says.
    """
    return path.removesuffix("/").removesuffix(".safetensors") if path else name


def is_adapter_name(name: str) -> bool:
    """Whether an adapter can be served under a name: its file's without the ending, or that of a
    folder, and a slash before it where it lies in a folder. No name leads anywhere else.
    """
    return _ADAPTER_NAME.fullmatch(name) is not None and name.isprintable()


def check_scale(field: str, adapter: object, scale: object) -> None:
    """Check the scale of an adapter, of which a field may have several.

    Raises:
        RequestError: it is no number, or too large.
    """
    try:
        check_number(field, scale, -MAX_ADAPTER_SCALE, MAX_ADAPTER_SCALE)
    except RequestError as error:
        raise RequestError(field, f"the scale of {adapter} {error.message}") from None


def round_up_size(pixels: int) -> int:
    """The next multiple of 16."""
    return -(-pixels // SIZE_MULTIPLE) * SIZE_MULTIPLE


def fit_size(width: int, height: int, limits: RequestLimits) -> tuple[int, int]:
    """The size that is generated where one off the grid is asked for, by whichever way in.

    Each side goes up to the next multiple of 16; where that is over the limits, both are scaled
    down. A size on the grid stays as it is, as does one that cannot be meant: `ImageRequest.check`
    refuses what is over the limits.
    """
    on_grid = width % SIZE_MULTIPLE == height % SIZE_MULTIPLE == 0
    if on_grid or min(width, height) <= 0 or max(width, height) > _ABSURD_SIDE:
        return width, height
    width, height = round_up_size(width), round_up_size(height)
    scale = min(
        1.0, limits.max_side / max(width, height), math.sqrt(limits.max_pixels / (width * height))
    )
    if scale < 1.0:
        width, height = (
            max(SIZE_MULTIPLE, int(side * scale) // SIZE_MULTIPLE * SIZE_MULTIPLE)
            for side in (width, height)
        )
    return width, height
