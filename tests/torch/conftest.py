"""What needs torch: Triton runs in its interpreter."""

import tests.torch.interpreted_triton  # noqa: F401 (before anything else that imports Triton)
