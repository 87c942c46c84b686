"""URLs that nobody can make up: a name, when it expires, and a signature of both."""

import hashlib
import hmac
import re
import secrets

from krea2_srt.images import FORMATS

MIN_KEY_BYTES = 16
"""As many bits as a name has: a shorter key would be what is guessed."""

_NAME = re.compile(rf"[0-9a-f]{{32}}\.(?:{'|'.join(FORMATS)})")
_EXPIRES = re.compile(r"[1-9][0-9]{0,11}")
_SIGNATURE = re.compile(r"[0-9a-f]{64}")


def new_name(extension: str) -> str:
    """A name of 128 random bits.

    Raises:
        ValueError: not an image's extension.
    """
    if extension not in FORMATS:
        raise ValueError(f"extension: must be one of {', '.join(FORMATS)}")
    return f"{secrets.token_hex(16)}.{extension}"


def sign(key: bytes, name: str, expires: int) -> str:
    """Signature of a name and a Unix time."""
    return hmac.new(key, f"{name}:{expires}".encode(), hashlib.sha256).hexdigest()


def verify(key: bytes, name: object, expires: object, signature: object) -> int | None:
    """When a URL expires, as a Unix time; None if it is not ours, whatever it is made of."""
    if isinstance(expires, int):
        # Python refuses to print huge ones.
        expires = str(expires) if 0 < expires < 10**12 else None
    if not (
        isinstance(name, str)
        and _NAME.fullmatch(name)
        and isinstance(expires, str)
        and _EXPIRES.fullmatch(expires)
        and isinstance(signature, str)
        and _SIGNATURE.fullmatch(signature)
    ):
        return None
    if not hmac.compare_digest(sign(key, name, int(expires)), signature):
        return None
    return int(expires)
