"""The policy's heads on the device that trains."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor

from drafttrain.rollouts.record import PolicyHead


class DeviceHeads:
    """Moves each policy version's ``lm_head`` to the device once; those used last stay there.

    Over a large vocabulary it is gigabytes, which take longer to copy than a microbatch to train,
    and the microbatches of a step are of several versions. Embeddings stay where they are: of them
    only rows are needed.
    """

    def __init__(self, device: torch.device, most_bytes: int | None = None) -> None:
        """Keep up to `most_bytes` of them, by default a quarter of the device's memory."""
        self._device = device
        self._most = _quarter(device) if most_bytes is None else most_bytes
        # By version, the one used last at the end: where it came from, and the moved one.
        self._moved: OrderedDict[int, tuple[Tensor, Tensor]] = OrderedDict()

    def moved(self, head: PolicyHead) -> PolicyHead:
        """`head` with its ``lm_head`` on the device."""
        version, source = head.policy_version, head.lm_head
        if source.device == self._device:
            return head
        known = self._moved.pop(version, None)
        there = known[1] if known and known[0] is source else source.to(self._device)
        self._moved[version] = source, there
        while len(self._moved) > 1 and self._bytes > self._most:
            self._moved.popitem(last=False)
        return replace(head, lm_head=there)

    def of(self, heads: Mapping[int, PolicyHead]) -> Mapping[int, PolicyHead]:
        """`heads`, each moved when it is asked for."""
        return _Moving(self, heads)

    @property
    def _bytes(self) -> int:
        return sum(there.nbytes for _, there in self._moved.values())


class _Moving(Mapping[int, PolicyHead]):
    def __init__(self, device: DeviceHeads, heads: Mapping[int, PolicyHead]) -> None:
        self._device, self._heads = device, heads

    def __getitem__(self, version: int) -> PolicyHead:
        return self._device.moved(self._heads[version])

    def __iter__(self) -> Iterator[int]:
        return iter(self._heads)

    def __len__(self) -> int:
        return len(self._heads)


def _quarter(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).total_memory) // 4
