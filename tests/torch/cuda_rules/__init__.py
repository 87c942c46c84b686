"""A model of CUDA's rules: production code takes its CUDA branches, on tensors without values.

Under `cuda_rules` tensors on ``cuda`` have shapes, strides and memory, streams have an order only
where somebody made one, and whatever CUDA or torch's allocator would refuse, or let go wrong in
silence, raises `RuleError`. Tensors on the host are real. What a host reads of the device is zero,
and finite. It is at least as strict as CUDA: where what CUDA does depends on timing, sizes or
versions, the worst is taken.
"""

from tests.torch.cuda_rules.install import cuda_rules
from tests.torch.cuda_rules.machine import Machine
from tests.torch.cuda_rules.rules import CudaError, Rule, RuleError

__all__ = ["CudaError", "Machine", "Rule", "RuleError", "cuda_rules"]
