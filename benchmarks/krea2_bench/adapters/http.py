"""Requests to the servers that are compared."""

import base64
import io
import time

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

SIDE, STEPS, PROMPT = 256, 8, "a red circle above a blue square"
_LIMIT_S = 300.0


class Client:
    """One server.

    Args:
        url: without a path.
    """

    def __init__(self, url: str) -> None:
        self._url = url
        self._http = httpx.Client(timeout=_LIMIT_S)

    def close(self) -> None:
        self._http.close()

    def picture(self, adapter: str | None = None, seed: int = 0) -> NDArray[np.int64]:
        """An image's pixels, [height, width, 3].

        Args:
            adapter: of a server that takes one with each request.
            seed: of its noise.
        """
        body = {
            "prompt": PROMPT,
            "size": f"{SIDE}x{SIDE}",
            "seed": seed,
            "num_inference_steps": STEPS,
            "response_format": "b64_json",
        }
        if adapter is not None:
            body["lora"] = [{"name": adapter}]
        answer = self._http.post(f"{self._url}/v1/images/generations", json=body)
        answer.raise_for_status()
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        return np.asarray(Image.open(io.BytesIO(data))).astype(np.int64)

    def set_adapter(self, name: str, path: str) -> None:
        """SGLang's: what all requests have from then on."""
        answer = self._http.post(
            f"{self._url}/v1/set_lora", json={"lora_nickname": name, "lora_path": path}
        )
        answer.raise_for_status()

    def seconds(self, adapter: str | None = None, seed: int = 0) -> float:
        """What an image takes."""
        start = time.perf_counter()
        self.picture(adapter, seed)
        return time.perf_counter() - start


def psnr(one: NDArray[np.int64], other: NDArray[np.int64]) -> float:
    """Peak signal to noise ratio of two pictures in dB."""
    error = float(((one - other) ** 2).mean())
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))
