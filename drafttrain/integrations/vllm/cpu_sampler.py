"""A correction of vLLM's CPU sampler under speculation.

Cause: ``_expand_kernel_impl`` (vLLM 0.32.0, ``vllm/utils/cpu_triton_utils.py``) is the CPU fallback
of the Triton kernel behind ``vllm.v1.sample.rejection_sampler.expand_batch_to_tokens``. It hands
the C++ kernel an int64 *copy* of an output that is float or int32, and never copies it back.
Per-token temperature, top-k and top-p are then uninitialised memory, and sampled outputs are not
the policy's. The Triton kernel on GPUs is right.

Applied only where the fault shows, by calling vLLM's own function once. It can go when the oldest
vLLM we support fills that output.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_ORIGINAL = "drafttrain_original"


def expand_batch_to_tokens(
    x: Tensor,
    cu_num_tokens: Tensor,
    num_tokens: int,
    replace_from: int = 0,
    replace_to: int = 0,
) -> Tensor:
    """Repeats ``x[i]`` for each token of request i, as vLLM's function of the same name promises.

    Args:
        x: [B] any dtype.
        cu_num_tokens: [B] integer, cumulative token counts.
        num_tokens: their total.
        replace_from: this value in x ...
        replace_to: ... becomes that one.

    Returns:
        [num_tokens], dtype of x.
    """
    counts = torch.diff(cu_num_tokens, prepend=cu_num_tokens.new_zeros(1))
    replaced = torch.where(x == replace_from, torch.full_like(x, replace_to), x)
    return replaced.repeat_interleave(counts.long(), output_size=num_tokens)


def is_faulty(expand: Any) -> bool:
    """Whether ``expand`` (vLLM's signature) gives wrong values on CPU tensors."""
    ends = torch.tensor([2, 3, 7], dtype=torch.int32)
    for x in (torch.tensor([0.625, 0.0, 2.5]), torch.tensor([3, 0, 5], dtype=torch.int32)):
        for replace_to in (0, 1):
            expected = expand_batch_to_tokens(x, ends, 7, 0, replace_to)
            if not torch.equal(expand(x, ends, 7, 0, replace_to), expected):
                return True
    return False


def in_force() -> bool:
    """Whether this process's vLLM is corrected."""
    from vllm.v1.sample import rejection_sampler

    return rejection_sampler.expand_batch_to_tokens is expand_batch_to_tokens


def apply() -> bool:
    """Corrects this process's vLLM if it runs on CPU and has the fault; harmless when repeated.

    Returns:
        Whether the correction is in force.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return False
    from vllm.v1.sample import rejection_sampler

    if in_force():
        return True
    if not is_faulty(rejection_sampler.expand_batch_to_tokens):
        return False
    setattr(rejection_sampler, _ORIGINAL, rejection_sampler.expand_batch_to_tokens)
    rejection_sampler.expand_batch_to_tokens = expand_batch_to_tokens
    return True


def remove() -> None:
    """Puts vLLM's own function back; harmless when the correction is not in force."""
    from vllm.v1.sample import rejection_sampler

    if in_force():
        rejection_sampler.expand_batch_to_tokens = getattr(rejection_sampler, _ORIGINAL)
