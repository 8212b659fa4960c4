"""One small adapter for each contender: its own model, packing, loss, clipping and optimizer."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from benchmarks.workload import Precision, Workload


@dataclass(frozen=True)
class Variant:
    """Settings of a contender that work on a CPU; the fastest counts.

    Attributes:
        precision: of its matrix products; master weights are float32 everywhere.
        attention: its attention implementation.
        compiled: whether its ``torch.compile`` decorators are left on.
        micro_batches: parts a step is cut into, gradients added up, where one is too large.
    """

    precision: Precision
    attention: str = "own"
    compiled: bool = False
    micro_batches: int = 1

    def __str__(self) -> str:
        parts = [self.precision]
        if self.attention != "own":
            parts.append(self.attention)
        if self.compiled:
            parts.append("compiled")
        if self.micro_batches > 1:
            parts.append(f"{self.micro_batches} micro-batches")
        return ", ".join(parts)


class Contender(ABC):
    """Built once, then stepped."""

    variants: ClassVar[tuple[Variant, ...]]

    @abstractmethod
    def __init__(self, workload: Workload, variant: Variant) -> None: ...

    @abstractmethod
    def step(self) -> None:
        """Batch making, forward with training-time test, loss, backward, clipping, optimizer."""


MODULES = {
    "drafttrain": "benchmarks.peers.ours",
    "floor": "benchmarks.floor",
    "speculators": "benchmarks.peers.speculators_eagle3",
    "specforge": "benchmarks.peers.specforge_eagle3",
}
PEERS = ("speculators", "specforge")


def load(name: str) -> type[Contender]:
    """The contender's class; only its own library is imported."""
    contender: type[Contender] = importlib.import_module(MODULES[name]).CONTENDER
    return contender
