"""The policy's heads on the device that trains."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor

from drafttrain.rollouts.record import PolicyHead


class LmHeads:
    """Moves each policy version's ``lm_head`` to the device once; those used last stay there.

    Over a large vocabulary it is gigabytes, which take longer to copy than a microbatch to train,
    and the microbatches of a step are of several versions.
    """

    def __init__(self, device: torch.device, most_bytes: int | None = None) -> None:
        """Keep up to `most_bytes` of them, by default a quarter of the device's memory."""
        self._device = device
        self._most = _quarter(device) if most_bytes is None else most_bytes
        self._moved: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def on_device(self, head: PolicyHead) -> Tensor:
        """The head's ``lm_head`` [V, H], there."""
        version, source = head.policy_version, head.lm_head
        if source.device == self._device:
            return source
        known = self._moved.pop(version, None)
        moved = known[1] if known and known[0] is source else source.to(self._device)
        self._moved[version] = source, moved
        while len(self._moved) > 1 and self._bytes > self._most:
            self._moved.popitem(last=False)
        return moved

    @property
    def _bytes(self) -> int:
        return sum(moved.nbytes for _, moved in self._moved.values())


def _quarter(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory) // 4
