"""The content policy: which checkers there are, and from which score on they refuse."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from krea2_srt.yaml_files import YamlFileError, read_yaml

Stage = Literal["prompt", "image"]

# Strict: YAML's yes would be 1.0, and refuse next to nothing.
Threshold = Annotated[float, Field(gt=0, le=1, strict=True)]


class ModerationConfigError(Exception):
    """The policy cannot be followed; names the file, the checker and the field."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class CheckerPolicy(_Entry):
    """What all checkers have.

    Attributes:
        categories: score from which on each category is refused.
        low: the same for requests with ``moderation: low``, where a category that is not here is
            off. None: `categories` hold for them too.
    """

    categories: dict[str, Threshold] = Field(min_length=1)
    low: dict[str, Threshold] | None = None

    def thresholds(self, low: bool) -> Mapping[str, float]:
        return self.low if low and self.low is not None else self.categories


class ModelPolicy(CheckerPolicy):
    """A Hugging Face classifier that runs here.

    Attributes:
        model: folder or repo id.
        device: where it runs.
    """

    type: Literal["text-classification", "image-classification"]
    model: str = Field(min_length=1)
    device: str = Field("cpu", min_length=1)

    @property
    def name(self) -> str:
        return f"{self.type} {self.model}"

    @property
    def checks(self) -> tuple[Stage, ...]:
        return ("prompt",) if self.type == "text-classification" else ("image",)


class AddressPolicy(CheckerPolicy):
    """An address that answers as OpenAI's ``/v1/moderations`` does.

    Attributes:
        url: what stands before that path.
        model: to ask for; the address has a default.
        api_key_env: environment variable that holds the key.
        checks: what is sent there.
    """

    type: Literal["openai-moderations"]
    url: str
    model: str | None = Field(None, min_length=1)
    api_key_env: str | None = Field(None, min_length=1)
    checks: tuple[Stage, ...] = Field(("prompt", "image"), min_length=1)

    @field_validator("url")
    @classmethod
    def _check_url(cls, url: str) -> str:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("must begin with http:// or https:// and a host")
        if parts.username is not None or parts.query or parts.fragment:
            raise ValueError("must have no user, query or fragment; for a key see api_key_env")
        url = url.rstrip("/")
        if url.endswith("/v1"):
            raise ValueError("must be without /v1, which is added")
        return url

    @property
    def name(self) -> str:
        return f"{self.type} {self.url}"


class Policy(_Entry):
    """The file.

    Attributes:
        checkers: each may refuse.
        on_error: what happens where a checker cannot answer.
        timeout_s: for each checker's answer.
    """

    checkers: tuple[Annotated[ModelPolicy | AddressPolicy, Field(discriminator="type")], ...] = (
        Field(min_length=1)
    )
    on_error: Literal["refuse", "allow"] = "refuse"
    timeout_s: float = Field(10.0, gt=0, strict=True, allow_inf_nan=False)


def load_policy(file: Path) -> Policy:
    """Read a policy.

    Raises:
        ModerationConfigError: it cannot be read, or something in it is wrong.
    """
    try:
        values = read_yaml(file)
    except YamlFileError as error:
        raise ModerationConfigError(f"{file}: {error}") from None
    try:
        policy = Policy.model_validate(values)
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        _refuse(file, values, problem["loc"], problem["msg"])
    for index, checker in enumerate(policy.checkers):
        if unknown := sorted((checker.low or {}).keys() - checker.categories.keys()):
            location = ("checkers", index, checker.type, "low", unknown[0])
            _refuse(file, values, location, "is not in categories")
    return policy


def field_error(
    file: Path, index: int, kind: str, field: str, message: str
) -> ModerationConfigError:
    """The error for a checker's field.

    Args:
        index: of the checker in the file, from 0.
        kind: its type.
    """
    where = f"checkers[{index}] ({kind})" if kind else f"checkers[{index}]"
    return ModerationConfigError(": ".join(filter(None, (str(file), where, field, message))))


def _refuse(file: Path, values: Any, location: tuple[int | str, ...], message: str) -> NoReturn:
    """Raise what pydantic found, in the file's own terms."""
    message = message.removeprefix("Value error, ")
    if len(location) < 2 or location[0] != "checkers":
        where = "".join(f"{name}: " for name in location)
        raise ModerationConfigError(f"{file}: {where}{message}")
    index = int(location[1])
    kind = str(location[2]) if len(location) > 2 else ""
    raise field_error(file, index, kind, ".".join(map(str, location[3:])), message)
