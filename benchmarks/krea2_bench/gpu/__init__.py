"""The parts of ``benchmarks/gpu.py``: they need torch, triton, transformers and safetensors."""
