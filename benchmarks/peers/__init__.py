"""One small adapter for each contender: its own model, packing, loss, clipping and optimizer."""

from __future__ import annotations

import importlib
from abc import ABC, abstractmethod
from dataclasses import dataclass

from benchmarks.workload import Precision, Workload


@dataclass(frozen=True)
class Variant:
    """Settings that differ between runs of one contender; of the precisions the faster counts.

    Attributes:
        precision: of its matrix products; master weights are float32 everywhere.
        micro_batches: parts a step is cut into, gradients added up, where one is too large.
    """

    precision: Precision
    micro_batches: int = 1

    def __str__(self) -> str:
        if self.micro_batches == 1:
            return self.precision
        return f"{self.precision}, {self.micro_batches} micro-batches"


class Contender(ABC):
    """Built once, then stepped."""

    @abstractmethod
    def __init__(self, workload: Workload, variant: Variant) -> None: ...

    @abstractmethod
    def step(self) -> None:
        """Batch making, forward with training-time test, loss, backward, clipping, optimizer."""


OURS = "drafttrain"
FLOOR = "floor"
PEERS = ("speculators", "specforge")
MODULES = {
    OURS: "benchmarks.peers.ours",
    FLOOR: "benchmarks.floor",
    "speculators": "benchmarks.peers.speculators_eagle3",
    "specforge": "benchmarks.peers.specforge_eagle3",
}
PRECISIONS: tuple[Precision, ...] = ("float32", "bfloat16")


def load(name: str) -> type[Contender]:
    """The contender's class; only its own library is imported."""
    contender: type[Contender] = importlib.import_module(MODULES[name]).CONTENDER
    return contender
