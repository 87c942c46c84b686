"""API keys: who may ask, and how much."""

import base64
import hashlib
import hmac
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, model_validator

from krea2_server.errors import ApiError
from krea2_server.settings import Settings
from krea2_srt.engine.engine import MAX_PRIORITY
from krea2_srt.errors import ConfigError
from krea2_srt.yaml_files import YamlFileError, read_yaml


@dataclass(frozen=True)
class Client:
    """Who asks.

    Attributes:
        name: for logs and metrics; never the key.
        requests_per_minute, max_concurrent: limits; 0 is none.
        max_priority: highest priority that it may give.
        low_moderation: whether it may ask for ``moderation: low``.
        adapters: patterns, as of file names, of the adapters that are there for it.
        admin: whether it may have adapters loaded and unloaded.
    """

    name: str
    requests_per_minute: float = 0.0
    max_concurrent: int = 0
    max_priority: int = MAX_PRIORITY
    low_moderation: bool = False
    adapters: tuple[str, ...] = ("*",)
    admin: bool = False

    def may_use(self, adapter: str) -> bool:
        """Whether there is an adapter of this name for it, if there is one at all."""
        return any(fnmatchcase(adapter, pattern) for pattern in self.adapters)


class _KeyEntry(BaseModel):
    """A key in the file."""

    model_config = ConfigDict(extra="forbid", hide_input_in_errors=True)

    name: str = Field(min_length=1, max_length=64)
    key: SecretStr | None = None
    sha256: str | None = Field(default=None, pattern="^[0-9a-f]{64}$")
    requests_per_minute: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    max_concurrent: int | None = Field(default=None, ge=0)
    max_priority: int = Field(default=MAX_PRIORITY, ge=-MAX_PRIORITY, le=MAX_PRIORITY)
    low_moderation: bool = False
    adapters: list[str] = Field(default=["*"], max_length=1024)
    admin: bool = False

    @model_validator(mode="after")
    def _check(self) -> "_KeyEntry":
        if (self.key is None) == (self.sha256 is None):
            raise ValueError("give either key or sha256")
        if self.key is not None and (problem := _problem(self.key.get_secret_value())):
            raise ValueError(f"key: {problem}")
        return self

    @property
    def digest(self) -> bytes:
        if self.key is not None:
            return _digest(self.key.get_secret_value())
        return bytes.fromhex(self.sha256 or "")


_MIN_KEY = 16


class Keys:
    """All keys; none means that whoever reaches us may ask.

    Args:
        clients: by the SHA-256 digest of their keys, which are not kept.
        anonymous: who asks where there are no keys.
    """

    def __init__(self, clients: dict[bytes, Client], anonymous: Client) -> None:
        self._clients = clients
        self._anonymous = anonymous

    @classmethod
    def from_settings(cls, settings: Settings) -> "Keys":
        """Read the keys' file and those in the environment.

        Raises:
            ConfigError: the file cannot be read, or an entry is wrong; names it.
        """
        default = Client("anonymous", settings.requests_per_minute, settings.max_concurrent)
        clients: dict[bytes, Client] = {}
        for index, key in enumerate(settings.plain_api_keys):
            if problem := _problem(key):
                raise ConfigError(f"api_keys: key {index} {problem}")
            clients[_digest(key)] = Client(
                f"key-{index}", settings.requests_per_minute, settings.max_concurrent
            )
        names = {client.name for client in clients.values()}
        for entry in _read(settings.api_keys_file):
            if entry.name in names or entry.digest in clients:
                raise ConfigError(f"api_keys_file: {entry.name}: name or key is there twice")
            names.add(entry.name)
            clients[entry.digest] = Client(
                entry.name,
                default.requests_per_minute
                if entry.requests_per_minute is None
                else entry.requests_per_minute,
                default.max_concurrent if entry.max_concurrent is None else entry.max_concurrent,
                entry.max_priority,
                entry.low_moderation,
                tuple(entry.adapters),
                entry.admin,
            )
        return cls(clients, default)

    def client(self, authorization: str | None, *, basic: bool = False) -> Client:
        """Whose key a request has.

        Args:
            authorization: the header of that name.
            basic: whether HTTP's Basic is read too, whose password is the key, or whose user.

        Raises:
            ApiError: 401, there are keys, and it has none of them.
        """
        if not self._clients:
            return self._anonymous
        scheme, _, text = (authorization or "").partition(" ")
        sent: list[str] = []
        if scheme.lower() == "bearer":
            sent = [text.strip()]
        elif basic and scheme.lower() == "basic":
            sent = _basic_keys(text.strip())
        if not any(sent):
            how = "Bearer KEY, or as Basic's password" if basic else "Bearer KEY"
            raise _unauthorized(f"no API key; send it as Authorization: {how}", "no_api_key", basic)
        digests = [_digest(key) for key in sent if key]
        # All of them, each in constant time: how long it takes tells nothing.
        found = [
            client
            for digest in digests
            for known, client in self._clients.items()
            if hmac.compare_digest(known, digest)
        ]
        if not found:
            raise _unauthorized("the API key is not valid", "invalid_api_key", basic)
        return found[0]


def check_rights(client: Client, priority: int, low_moderation: bool) -> None:
    """Refuse what a key does not allow.

    Raises:
        ApiError: 403, naming the field.
    """
    if priority > client.max_priority:
        text = f"priority: must be at most {client.max_priority} with this key"
        raise ApiError(403, text, "not_allowed", "priority")
    if low_moderation and not client.low_moderation:
        text = "moderation: low needs a key that allows it"
        raise ApiError(403, text, "not_allowed", "moderation")


def _read(path: Path | None) -> list[_KeyEntry]:
    if path is None:
        return []
    try:
        values = read_yaml(path)
    except YamlFileError as error:
        raise ConfigError(f"api_keys_file: {path}: {error}") from None
    entries = values.get("keys") if isinstance(values, dict) else None
    if not isinstance(entries, list) or not entries or len(values) != 1:
        raise ConfigError(f"api_keys_file: {path}: must hold a list named keys, and only that")
    found = []
    for index, entry in enumerate(entries):
        try:
            found.append(_KeyEntry.model_validate(entry))
        except ValidationError as error:
            problem = error.errors(include_url=False, include_input=False)[0]
            where = ".".join(["keys", str(index), *map(str, problem["loc"])])
            message = problem["msg"].removeprefix("Value error, ")
            raise ConfigError(f"api_keys_file: {path}: {where}: {message}") from None
    return found


def _problem(key: str) -> str | None:
    """What is wrong with a key."""
    if len(key) < _MIN_KEY:
        return f"must have at least {_MIN_KEY} characters"
    if not key.isascii() or not key.isprintable() or " " in key:
        # HTTP knows no others in headers.
        return "must have printable ASCII characters only, without spaces"
    return None


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogatepass")).digest()


def _basic_keys(text: str) -> list[str]:
    """What may be the key in ``user:password``: the password, the user, or a key with a colon."""
    try:
        decoded = base64.b64decode(text, validate=True).decode("latin-1")
    except ValueError:
        return []
    user, _, password = decoded.partition(":")
    return [password, user, decoded]


def _unauthorized(message: str, code: str, basic: bool = False) -> ApiError:
    schemes = 'Basic realm="krea2-serve", Bearer' if basic else "Bearer"
    return ApiError(401, message, code, headers={"www-authenticate": schemes})
