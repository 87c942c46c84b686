"""What this machine does at best, in a process of its own: ``python -m krea2_bench.ceilings``.

Prints a line of JSON: the rate of a large matrix product in bf16, and of a large copy.
"""

import json

_SIDE = {"cuda": 8192, "cpu": 2048}
_COPY = {"cuda": 2**30, "cpu": 2**26}


def main() -> None:
    import torch

    from krea2_bench.gpu.timing import timings

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    side = _SIDE[device.type]
    # Random: zeros run faster.
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(_COPY[device.type], device=device)
    target = torch.empty_like(source)
    product, copy = timings([lambda: a @ b, lambda: target.copy_(source)], device)
    print(
        json.dumps(
            {
                "tflops": 2 * side**3 / product.low / 1e9,
                "gbytes_per_s": 2 * source.nbytes / copy.low / 1e6,
            }
        )
    )


if __name__ == "__main__":
    main()
