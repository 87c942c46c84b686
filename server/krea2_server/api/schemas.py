"""What crosses HTTP: the request and response of OpenAI's images API, with our own fields."""

from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PrivateAttr,
    ValidationInfo,
    field_validator,
    model_validator,
)

from krea2_server.api.field_errors import FieldError, UnknownFieldError, UnsupportedError
from krea2_srt.engine.engine import MAX_DEADLINE_S, MAX_PRIORITY
from krea2_srt.request import MAX_ADAPTERS, MAX_SEED

Quality = Literal["low", "medium", "high", "xhigh", "max", "auto", "standard", "hd"]
OutputFormat = Literal["png", "jpeg", "webp"]
ResponseFormat = Literal["url", "b64_json"]

MAX_PROMPT = 32_000
"""Characters, by OpenAI's contract; the model reads 512 tokens, 5 of them its template's."""

MAX_IMAGES = 10
MAX_PARTIAL_IMAGES = 3
_MAX_IDENTIFIER = 512
_MAX_TOLD = 64

# Fields and values of OpenAI's contract that this model has nothing for.
_UNSUPPORTED_VALUES = {
    ("background", "transparent"): "it must be opaque or auto",
    ("output_format", "gif"): "it must be png, jpeg or webp",
    ("output_format", "svg"): "it must be png, jpeg or webp",
}
UNSUPPORTED_FIELDS = {
    "style": "describe the style in the prompt instead",
    "complexity": "this model does not plan its images",
    "frame_count": "only single images are generated",
    "frame_duration_ms": "only single images are generated",
    "svg": "only png, jpeg and webp are made",
    "image": "images cannot be edited",
    "mask": "images cannot be edited",
    "input_fidelity": "images cannot be edited",
}


class AdapterField(BaseModel):
    """An adapter, and how strongly it works."""

    model_config = ConfigDict(extra="forbid", strict=True)

    name: str = Field(max_length=256, description="As /v1/loras lists it.")
    scale: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="1 is as it was trained; by default what /v1/loras says.",
    )


class ImageGenerationRequest(BaseModel):
    """Body of ``POST /v1/images/generations``; null is as good as absent."""

    model_config = ConfigDict(extra="forbid", strict=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_PROMPT,
        description="What to generate. The model reads the first 507 tokens.",
    )
    model: str | None = Field(default=None, max_length=256, description="As /v1/models lists it.")
    n: int | None = Field(
        default=None, ge=1, le=MAX_IMAGES, description="Images; their seeds count up from seed."
    )
    size: str | None = Field(
        default=None,
        max_length=32,
        description="WIDTHxHEIGHT in multiples of 16, between 1:3 and 3:1, or auto: by quality.",
    )
    quality: Quality | None = Field(
        default=None, description="Steps, and the size where that is auto; see docs/server.md."
    )
    background: Literal["opaque", "auto"] | None = Field(
        default=None, description="Always opaque; transparent is refused."
    )
    moderation: Literal["low", "auto"] | None = Field(
        default=None, description="low needs a key that allows it."
    )
    output_format: OutputFormat | None = Field(default=None, description="png by default.")
    output_compression: int | None = Field(
        default=None, ge=0, le=100, description="Quality of jpeg and webp; 100 by default."
    )
    response_format: ResponseFormat | None = Field(default=None, description="b64_json by default.")
    stream: bool | None = Field(default=None, description="Answer with server-sent events.")
    partial_images: int | None = Field(
        default=None,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description="Previews of each image in a stream.",
    )
    user: str | None = Field(default=None, max_length=_MAX_IDENTIFIER)
    safety_identifier: str | None = Field(default=None, max_length=_MAX_IDENTIFIER)

    seed: int | None = Field(
        default=None, ge=0, le=MAX_SEED, description="Of the first image; random where absent."
    )
    num_inference_steps: int | None = Field(
        default=None, ge=1, description="Denoising steps, whatever the quality."
    )
    guidance_scale: float | None = Field(
        default=None, ge=0, allow_inf_nan=False, description="Krea's scale: 0 is off."
    )
    negative_prompt: str | None = Field(
        default=None, max_length=MAX_PROMPT, description="What guidance steers away from."
    )
    priority: int | None = Field(
        default=None, ge=-MAX_PRIORITY, le=MAX_PRIORITY, description="Higher is sooner."
    )
    deadline_ms: float | None = Field(
        default=None,
        gt=0,
        le=MAX_DEADLINE_S * 1e3,
        allow_inf_nan=False,
        description="From now; after it the request fails.",
    )
    width: int | None = Field(default=None, description="With height, in place of size.")
    height: int | None = Field(default=None, description="With width, in place of size.")
    embed_metadata: bool | None = Field(
        default=None,
        description="Put prompts, seed and settings into the images' files, as A1111 does.",
    )

    lora: list[AdapterField] | None = Field(
        default=None,
        max_length=MAX_ADAPTERS,
        description="Adapters; model may name one too, MODEL:ADAPTER, and the prompt any, "
        "<lora:NAME:SCALE>.",
    )

    # Copied for each request; of a factory pydantic reads the signature each time, for 0.1 ms.
    _warnings: list[str] = PrivateAttr(default=[])
    _sent_as: dict[str, str] = PrivateAttr(default={})
    _model_adapter: str | None = PrivateAttr(default=None)

    @property
    def warnings(self) -> list[str]:
        """What the client should know of fields that had no effect, or another one than asked."""
        return self._warnings

    @property
    def is_lenient(self) -> bool:
        """Whether what is harmless is accepted and named."""
        return False

    def sent_as(self, field: str) -> str:
        """What the client called a field."""
        return self._sent_as.get(field, field)

    @property
    def model_adapter(self) -> str | None:
        """The adapter that the model's name has behind a colon."""
        return self._model_adapter

    def set_model_adapter(self, adapter: str | None, param: str) -> None:
        """Say which adapter the model's name has.

        Args:
            param: what the client calls the field of the model's name.
        """
        self._model_adapter = adapter
        self._sent_as = {**self._sent_as, "model": param}

    @property
    def wants_urls(self) -> bool:
        """Whether images are answered as URLs."""
        return self.response_format == "url"

    @property
    def low_moderation(self) -> bool:
        return self.moderation == "low"

    @property
    def end_user(self) -> str | None:
        """The client's name for its user."""
        return self.safety_identifier or self.user or None

    @field_validator("prompt", "negative_prompt")
    @classmethod
    def _check_text(cls, text: str | None, info: ValidationInfo) -> str | None:
        if text is not None and "\0" in text:
            field = str(info.field_name)
            raise FieldError(field, f"{field}: must not hold NUL characters")
        return text

    @field_validator("prompt")
    @classmethod
    def _check_prompt(cls, prompt: str) -> str:
        if not prompt.strip():
            raise FieldError("prompt", "prompt: must not be blank")
        return prompt

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        for field, reason in UNSUPPORTED_FIELDS.items():
            if values.get(field) is not None:
                raise UnsupportedError(field, reason)
        for (field, value), reason in _UNSUPPORTED_VALUES.items():
            if values.get(field) == value:
                raise UnsupportedError(field, reason, value)
        known = {k: value for k, value in values.items() if k not in UNSUPPORTED_FIELDS}
        # One is enough to refuse; pydantic would tell of each of a hundred thousand.
        for name in known:
            if name not in cls.model_fields:
                raise UnknownFieldError(str(name)[:_MAX_TOLD])
        return known


class TokensDetails(BaseModel):
    image_tokens: int
    text_tokens: int


class Usage(BaseModel):
    """Text tokens that the model has read, and latent tokens that it has denoised."""

    input_tokens: int
    input_tokens_details: TokensDetails
    output_tokens: int
    output_tokens_details: TokensDetails
    total_tokens: int

    @classmethod
    def of(cls, text_tokens: int, image_tokens: int) -> "Usage":
        return cls(
            input_tokens=text_tokens,
            input_tokens_details=TokensDetails(image_tokens=0, text_tokens=text_tokens),
            output_tokens=image_tokens,
            output_tokens_details=TokensDetails(image_tokens=image_tokens, text_tokens=0),
            total_tokens=text_tokens + image_tokens,
        )


class Timings(BaseModel):
    """Milliseconds of the request in each stage."""

    queue_ms: float
    encode_ms: float
    denoise_ms: float
    decode_ms: float


class ImageMetadata(BaseModel):
    """What is said of a picture beside the picture, in responses and in events."""

    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    quality: Literal["low", "medium", "high", "xhigh", "max"]
    size: str
    model: str
    seed: int = Field(description="Of this image, or of the first one.")
    num_inference_steps: int
    guidance_scale: float
    safety_identifier: str | None = None
    warnings: list[str] | None = Field(
        default=None, description="Of fields that had no effect, or another one than asked."
    )


class ImageData(BaseModel):
    """One image: b64_json or url."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class AdapterUsed(BaseModel):
    """An adapter that an image was generated with."""

    name: str
    scale: float
    sha256: str = Field(description="Of its files.")


class ImagesResponse(ImageMetadata):
    """Answer of ``POST /v1/images/generations``."""

    lora: list[AdapterUsed] | None = Field(default=None, description="Absent without adapters.")
    created: int = Field(description="Unix time in seconds.")
    data: list[ImageData]
    prompt_truncated: bool = Field(description="Whether the model has read only its beginning.")
    usage: Usage
    timings: Timings


class PartialImageEvent(ImageMetadata):
    """A preview in a stream."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    created_at: int
    partial_image_index: int = Field(description="Counts the previews of one image.")
    image_index: int
    step: int
    total_steps: int


class CompletedEvent(ImageMetadata):
    """An image in a stream. Its usage has its own image tokens and, of the first image, the text
    tokens, so that all of them add up to the request's; timings are the request's.
    """

    type: Literal["image_generation.completed"] = "image_generation.completed"
    b64_json: str
    url: str | None = Field(default=None, description="Where response_format is url.")
    created_at: int
    image_index: int
    lora: list[AdapterUsed] | None = Field(default=None, description="Absent without adapters.")
    prompt_truncated: bool
    usage: Usage
    timings: Timings


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every failure."""

    error: ErrorDetail


class QualityCapabilities(BaseModel):
    """What a quality stands for where a request says nothing else."""

    num_inference_steps: int
    size: str


class ModelCapabilities(BaseModel):
    """What the model does by itself, and how far it goes; for the key of who asks."""

    default_steps: int
    default_guidance: float
    trained_side: int = Field(description="Pixels of the longest side that it was trained on.")
    max_n: int
    max_side: int
    max_pixels: int
    max_steps: int
    max_guidance: float
    size_multiple: int = Field(description="Of which widths and heights are multiples.")
    max_aspect: int = Field(description="Longest side over shortest.")
    default_size: str | None = Field(
        None, description="Of a request without one; absent if the server's own is impossible."
    )
    max_prompt: int = Field(description="Characters of a prompt, and of a negative prompt.")
    qualities: dict[Quality, QualityCapabilities]
    output_formats: list[OutputFormat]
    response_formats: list[ResponseFormat]
    default_response_format: ResponseFormat
    default_embed_metadata: bool
    stream: bool = Field(description="Whether answers can be streams.")
    max_partial_images: int
    moderation: list[Literal["auto", "low"]] = Field(description="That this key may ask for.")
    min_priority: int
    max_priority: int = Field(description="Of this key.")
    max_deadline_ms: float
    requests_per_minute: float | None = Field(None, description="Of this key; absent: any.")
    max_concurrent: int | None = Field(None, description="Of this key; absent: any.")


class Model(BaseModel):
    id: str
    parent: str | None = Field(None, description="Of an adapter: the model that it is for.")
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "krea"
    krea2: ModelCapabilities | None = Field(None, description="Absent until the model is loaded.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class QueueState(BaseModel):
    """Answer of ``/v1/queue``."""

    waiting: int = Field(description="Requests that have not begun.")
    running: int = Field(description="Requests that have begun.")
    estimated_wait_s: float | None = Field(
        description="Of a new request behind all of them; null where no replica answers."
    )
    replicas_ready: int
    replicas: int


class Status(BaseModel):
    """Answer of ``/health`` and ``/ready``."""

    status: str
