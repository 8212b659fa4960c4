"""Layer one: what one engine step costs, part by part.

A step verifies k drafts of every running request (k = 0: it generates without speculation) and
drafts k more. The parts add up; nothing overlaps:

====================  ==============================================================================
``weights``           reading the policy's weights; of an MoE's experts those that at least one of
                      the batch x (k + 1) tokens is routed to, ``1 - (1 - top/experts) ** tokens``
``kv cache``          reading the running requests' KV, once for all k + 1 positions of a request
``compute``           2 operations a weight and token, and attention's over the context
``communication``     two all-reduces a layer in a tensor-parallel replica
``sampling``          passes over the float32 logits of every verified position
``host``              the engine's software, whatever the batch
``outside graphs``    launches layer by layer, when a step has more tokens than any captured graph
``drafting``          k passes of the drafter, one after another; for n-grams the search
====================  ==============================================================================
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drafttrain.control.economics import EngineCost, StepCost
from drafttrain.simulator.hardware import BYTES, Device, Engine, Precision
from drafttrain.simulator.models import DrafterShape, ModelShape

Array = NDArray[np.float64]


class StepModel(ABC):
    """What a step costs, by batch, mean context and k; arrays broadcast against each other.

    Every part is affine in the context: so much at none, and so much for each token of it.
    """

    @abstractmethod
    def parts(self, batch: Any, context: Any, k: Any) -> dict[str, Array]:
        """Seconds of each part of a step.

        Args:
            batch: running requests.
            context: tokens in each of their KV caches, on average.
            k: draft tokens for each.
        """

    @abstractmethod
    def prefill_seconds(self, tokens: Any) -> Any:
        """Seconds to read in `tokens` prompt tokens."""

    def seconds(self, batch: Any, context: Any, k: Any) -> Array:
        """Seconds of a step."""
        return np.asarray(sum(self.parts(batch, context, k).values()))


@dataclass(frozen=True)
class AtContext(StepCost):
    """A step model at one mean context: answers what a :class:`StepCost` is asked."""

    model: StepModel
    context: float

    def step_seconds(self, batch: float, k: int) -> float:
        """Seconds of one step of `batch` running requests with k draft tokens each."""
        return float(self.model.seconds(batch, self.context, k))


@dataclass(frozen=True)
class Measured(StepModel):
    """A step as fitted from an engine's own timings; the context is taken to cost nothing."""

    cost: EngineCost

    def parts(self, batch: Any, context: Any, k: Any) -> dict[str, Array]:
        """Seconds of each part of a step."""
        cost, zero = self.cost, 0.0 * np.asarray(context)
        return {
            "step": cost.step + cost.request * batch + zero,
            "tokens": cost.token * batch * (k + 1) + zero,
            "drafting": cost.speculation * (np.asarray(k) > 0) + cost.draft * k + zero,
        }

    def prefill_seconds(self, tokens: Any) -> Any:
        """Seconds to read in `tokens` prompt tokens."""
        return self.cost.token * tokens


@dataclass(frozen=True)
class Roofline(StepModel):
    """A step of one replica from the sizes of its models and the rates of its devices.

    Attributes:
        drafter: None for n-grams, found by searching the context.
        devices: in the replica; weights, KV and compute are divided evenly among them.
    """

    policy: ModelShape
    device: Device
    engine: Engine
    precision: Precision
    kv_precision: Precision = "bf16"
    drafter: DrafterShape | None = None
    devices: int = 1

    def parts(self, batch: Any, context: Any, k: Any) -> dict[str, Array]:
        """Seconds of each part of a step."""
        batch, context, k = (np.asarray(value, dtype=np.float64) for value in (batch, context, k))
        tokens = batch * (k + 1)
        logits = 4.0 * self.policy.vocab_size * tokens
        return {
            "weights": self._weights(self.policy, tokens),
            "kv cache": self._kv(self.policy, batch * context),
            "compute": self._compute(self.policy, tokens, context),
            "communication": self._communication(self.policy, tokens),
            "sampling": self.device.read_seconds(self.engine.sampling_passes * logits),
            "host": self.engine.host + 0.0 * tokens,
            "outside graphs": self._outside_graphs(tokens),
            "drafting": self._drafting(batch, context, k),
        }

    def prefill_seconds(self, tokens: Any) -> Any:
        """Seconds to read in `tokens` prompt tokens; compute alone."""
        return self._compute(self.policy, tokens, 0.0)

    @property
    def weight_bytes(self) -> float:
        """Bytes of the policy's weights on each device."""
        weights = self.policy.shared_weights + self.policy.expert_weights
        return weights * BYTES[self.precision] / self.devices

    @property
    def kv_bytes(self) -> float:
        """Bytes that a token's KV takes on each device."""
        return self._kv_bytes(self.policy)

    def _kv_bytes(self, model: ModelShape) -> float:
        # A KV head is not divided: with more devices than heads, each is kept several times.
        share = max(1.0 / self.devices, 1.0 / model.kv_heads)
        return model.kv_width * BYTES[self.kv_precision] * share

    def _weights(self, model: ModelShape, tokens: Array) -> Array:
        weights = model.shared_weights + 0.0 * tokens
        if model.experts:
            untouched = (1 - model.experts_per_token / model.experts) ** tokens
            weights = weights + model.expert_weights * (1 - untouched)
        size = weights * BYTES[self.precision] / self.devices
        return np.asarray(self.device.read_seconds(size))

    def _kv(self, model: ModelShape, tokens: Array) -> Array:
        return np.asarray(self.device.read_seconds(self._kv_bytes(model) * tokens))

    def _compute(self, model: ModelShape, tokens: Any, context: Any) -> Array:
        attention = 4 * model.layers * model.heads * model.head_dim * context
        operations = (2 * model.active_weights + attention) * tokens
        return np.asarray(self.device.compute_seconds(operations / self.devices, self.precision))

    def _communication(self, model: ModelShape, tokens: Array) -> Array:
        if self.devices == 1:
            return 0.0 * tokens
        sent = 2 * (self.devices - 1) / self.devices * 2 * model.hidden_size * tokens
        one = self.device.link_latency + sent / self.device.link_bandwidth
        return np.asarray(2 * model.layers * one)

    def _outside_graphs(self, tokens: Array) -> Array:
        if self.engine.captured_tokens is None:
            return 0.0 * tokens
        launches = self.policy.layers * self.engine.uncaptured_layer
        return np.where(tokens > self.engine.captured_tokens, launches, 0.0)

    def _drafting(self, batch: Array, context: Array, k: Array) -> Array:
        if self.drafter is None:
            return np.where(k > 0, self.engine.lookup * batch * context, 0.0)
        model, fusing = self.drafter.model, self.drafter.fusing
        one_pass = (
            self.engine.draft
            + self.device.read_seconds(fusing * BYTES[self.precision] / self.devices)
            + self._weights(model, batch)
            + self._kv(model, batch * context)
            + self._communication(model, batch)
        )
        # The first pass takes in all k + 1 verified positions, each later one a token a request.
        tokens = batch * 2 * k
        fused = self.device.compute_seconds(2 * fusing * tokens / self.devices, self.precision)
        return np.asarray(k * one_pass + self._compute(model, tokens, context) + fused)
