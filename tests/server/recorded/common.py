"""Requests in the words of common clients, on a server that reads them, as it does by default."""

from tests.server.recorded.exchange import Exchange, generate, stream

_BODIES: dict[str, dict[str, object]] = {
    "NextChat": {"quality": "standard", "style": "vivid", "n": 1, "response_format": "b64_json"},
    "LibreChat": {"model": "dall-e-3", "quality": "standard", "style": "vivid", "n": 1},
    "SGLang's own script": {
        "guidance_scale": 1.0,
        "negative_prompt": " ",
        "output_quality": "high",
    },
    "vLLM-Omni's script": {"true_cfg_scale": 4.0, "num_inference_steps": 50, "seed": 42},
    "SiliconFlow": {"batch_size": 2, "num_inference_steps": 4, "guidance_scale": 0, "seed": "7"},
    "lobe-chat": {"aspectRatio": "16:9", "cfg": 2.5, "steps": 4, "seed": 7, "size": None},
    "OpenVINO's server": {"rng_seed": 5, "num_images_per_prompt": 2},
    "Together": {"response_format": "base64", "steps": 4, "width": 64, "height": 64, "size": ""},
    "Replicate": {"num_outputs": 1, "go_fast": True, "output_format": "jpg", "output_quality": 80},
    "a size off the grid": {"size": "63x120"},
    "a compression of png": {"output_compression": 50},
    "a negative prompt without guidance": {"negative_prompt": "rain"},
    "previews without a stream": {"partial_images": 2},
    "a typo": {"stpes": 3},
    "a field that nobody knows": {"flux_capacitor": 1},
    "two fields that disagree": {"steps": 3, "num_inference_steps": 4},
    "steps over the limit": {"steps": 10**6},
    "an adapter": {"lora": {"path": "x"}},
    "a transparent background": {"background": "transparent"},
}

COMMON: list[Exchange] = [
    *(
        generate(name, fields=fields, leave_out=("seed",) if "rng_seed" in fields else ())
        for name, fields in _BODIES.items()
    ),
    stream("warnings in a stream", {"style": "vivid", "partial_images": 1, "steps": 2}),
]
