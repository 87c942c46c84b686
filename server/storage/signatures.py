"""URLs that nobody can make up: a name, when it expires, and a signature of both."""

import hashlib
import hmac
import re
import secrets

_NAME = re.compile(r"[0-9a-f]{32}\.(png|jpeg|webp)")
_EXPIRES = re.compile(r"[0-9]{1,12}")
_SIGNATURE = re.compile(r"[0-9a-f]{64}")


def new_name(extension: str) -> str:
    """A name of 128 random bits."""
    return f"{secrets.token_hex(16)}.{extension}"


def is_name(name: str) -> bool:
    """Whether it is a name that we may have given."""
    return _NAME.fullmatch(name) is not None


def sign(key: bytes, name: str, expires: int) -> str:
    """Signature of a name and a Unix time."""
    return hmac.new(key, f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()


def verify(key: bytes, name: str, expires: str, signature: str) -> int | None:
    """When a URL expires, as a Unix time; None if it is not ours."""
    if not (is_name(name) and _EXPIRES.fullmatch(expires) and _SIGNATURE.fullmatch(signature)):
        return None
    if not hmac.compare_digest(sign(key, name, int(expires)), signature):
        return None
    return int(expires)
