"""A checker behind an address that answers as OpenAI's ``/v1/moderations`` does."""

import asyncio
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import httpx
import orjson
import pybase64

from krea2_server.moderation.checkers import CheckerError
from krea2_server.moderation.policy import AddressPolicy, Stage
from krea2_srt.images import MEDIA_TYPES

_BROKEN_CONNECTION = (httpx.NetworkError, httpx.RemoteProtocolError)
"""Also of one that was kept and that the other end has just closed."""


class ApiKeyError(Exception):
    """There is no usable key in the environment."""


class OpenAIModerations:
    """A `Checker` that asks an address.

    Args:
        policy: which, and what of it.
    """

    def __init__(self, policy: AddressPolicy) -> None:
        self.policy = policy
        self._client: httpx.AsyncClient | None = None

    def start(self) -> None:
        """Get ready; asks nothing yet.

        Raises:
            ApiKeyError: there is no key in the environment.
        """
        headers = {"content-type": "application/json"}
        if (variable := self.policy.api_key_env) is not None:
            key = os.environ.get(variable, "").strip()
            if not key:
                raise ApiKeyError(f"{variable} is not set")
            if not (key.isascii() and key.isprintable()):
                raise ApiKeyError(f"{variable} has characters that no key has")
            headers["authorization"] = f"Bearer {key}"
        # Time is the caller's matter: the policy's limit is for the whole check.
        self._client = httpx.AsyncClient(headers=headers, timeout=None)

    async def close(self) -> None:
        if self._client is not None:
            client, self._client = self._client, None
            await client.aclose()

    async def scores(self, stage: Stage, contents: Sequence[Any]) -> Mapping[str, float]:
        if stage == "prompt":
            results = await self._ask(self._body(list(contents)), len(contents))
        else:
            # One at a time is what all such servers take.
            asked = await asyncio.gather(*map(self._ask_image, contents))
            results = [result for each in asked for result in each]
        return {
            category: max(_score(result, category) for result in results)
            for category in self.policy.categories
        }

    async def _ask_image(self, image: bytes) -> list[Any]:
        # In a thread: there may be many megabytes to encode.
        return await self._ask(await asyncio.to_thread(self._image_body, image), 1)

    def _image_body(self, image: bytes) -> bytes:
        url = f"data:{_media_type(image)};base64,{pybase64.b64encode_as_string(image)}"
        return self._body([{"type": "image_url", "image_url": {"url": url}}])

    def _body(self, content: list[Any]) -> bytes:
        model = {} if self.policy.model is None else {"model": self.policy.model}
        return orjson.dumps({"input": content, **model})

    async def _ask(self, body: bytes, count: int) -> list[Any]:
        """The answer's results, which are as many as there are inputs or more."""
        try:
            response = await self._post(body)
        except httpx.HTTPError as error:
            raise CheckerError(type(error).__name__) from None
        if response.status_code != httpx.codes.OK:
            raise CheckerError(f"response status {response.status_code}")
        try:
            results = orjson.loads(response.content)["results"]
        except (ValueError, KeyError, TypeError):
            raise CheckerError("unexpected response from /v1/moderations") from None
        if not isinstance(results, list) or len(results) < count:
            raise CheckerError("too few results in the response")
        return results

    async def _post(self, body: bytes) -> httpx.Response:
        if self._client is None:
            raise CheckerError("it is not started")
        url = f"{self.policy.url}/v1/moderations"
        try:
            return await self._client.post(url, content=body)
        except _BROKEN_CONNECTION:
            # Asking twice does no harm.
            return await self._client.post(url, content=body)


def _score(result: Any, category: str) -> float:
    """A category's score, or where it has none, whether it is flagged."""
    score = _value(result, "category_scores", category)
    # To Python a flag is a number too; not here.
    if isinstance(score, int | float) and not isinstance(score, bool) and math.isfinite(score):
        return float(score)
    flag = _value(result, "categories", category)
    if isinstance(flag, bool):
        return float(flag)
    raise CheckerError(f"no score for category {category} in the response")


def _value(result: Any, group: str, category: str) -> Any:
    values = result.get(group) if isinstance(result, dict) else None
    return values.get(category) if isinstance(values, dict) else None


def _media_type(image: bytes) -> str:
    if image.startswith(b"\x89PNG"):
        return MEDIA_TYPES["png"]
    return MEDIA_TYPES["webp" if image.startswith(b"RIFF") else "jpeg"]
