"""Devices and engines: the constants of the roofline.

A *device* is what the data sheet says, and the fraction of it that kernels reach. An *engine* is
the software around the kernels: seconds that no faster memory would save. ``vllm`` is fitted to
published measurements (``calibration.yaml``); ``ideal`` has none of them, as a projection from
kernels and interconnect alone assumes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from drafttrain.config import Seconds, Section

Precision = Literal["fp32", "bf16", "fp8"]
# Bytes, or so many of them or operations in a second.
Rate = Annotated[float, Field(ge=1, le=1e20)]
Efficiency = Annotated[float, Field(ge=1e-6, le=1)]
BYTES: dict[Precision, int] = {"fp32": 4, "bf16": 2, "fp8": 1}


class Device(Section):
    """One accelerator (or the CPU), and its links to the others of its replica."""

    memory: Rate
    """Bytes."""
    bandwidth: Rate
    """Bytes per second of its memory."""
    flops: dict[Precision, Rate] = Field(min_length=1)
    """Dense floating point operations per second, by precision."""
    link_bandwidth: Rate = 1e9
    """Bytes per second to other devices of the replica, one direction."""
    link_latency: Seconds = 0.0
    """Seconds of an all-reduce of nothing."""
    bandwidth_efficiency: Efficiency = 0.75
    flops_efficiency: Efficiency = 0.6

    def read_seconds(self, size: Any) -> Any:
        """Seconds to read `size` bytes."""
        return size / (self.bandwidth * self.bandwidth_efficiency)

    def compute_seconds(self, operations: Any, precision: Precision) -> Any:
        """Seconds for `operations` floating point operations."""
        return operations / (self.flops[precision] * self.flops_efficiency)


# Vendors' data sheets: dense rates without sparsity, SXM modules, NVLink in one direction. The
# efficiencies are common for decoding kernels, and assumed. The CPU's are of one shared core.
DEVICES = {
    "gb200": Device(
        memory=186e9,
        bandwidth=8e12,
        flops={"bf16": 2.5e15, "fp8": 5e15},
        link_bandwidth=900e9,
        link_latency=8e-6,
    ),
    "h200": Device(
        memory=141e9,
        bandwidth=4.8e12,
        flops={"bf16": 989e12, "fp8": 1979e12},
        link_bandwidth=450e9,
        link_latency=10e-6,
    ),
    "h100": Device(
        memory=80e9,
        bandwidth=3.35e12,
        flops={"bf16": 989e12, "fp8": 1979e12},
        link_bandwidth=450e9,
        link_latency=10e-6,
    ),
    "a100": Device(
        memory=80e9,
        bandwidth=2.04e12,
        flops={"bf16": 312e12},
        link_bandwidth=300e9,
        link_latency=12e-6,
    ),
    "cpu": Device(memory=24e9, bandwidth=20e9, flops={"fp32": 100e9, "bf16": 400e9}),
}


class Engine(Section):
    """Seconds that the engine's software adds to a step."""

    host: Seconds = 0.0
    """Every step: scheduling, preparing inputs, handing out tokens."""
    draft: Seconds = 0.0
    """Each drafting pass, beyond reading and computing: launches, metadata, sampling the draft."""
    captured_tokens: int | None = Field(None, ge=0, le=1 << 24)
    """Most tokens in a step that a captured CUDA graph serves; null: no such edge."""
    uncaptured_layer: Seconds = 0.0
    """Each of the policy's layers in a step beyond ``captured_tokens``."""
    lookup: Seconds = 0.0
    """N-gram drafts: each token of each running request's context, every step."""
    sampling_passes: float = Field(0.0, ge=0, le=1e6)
    """Passes over the float32 logits of every verified position."""


def lookup(table: dict[str, Any], what: str, value: Any) -> Any:
    """The entry of `table` when `value` is its name; anything else is the value itself.

    With ``{like: name, field: ...}`` it is the entry of that name with some fields changed.
    """
    if isinstance(value, dict) and "like" in value:
        known = lookup(table, what, value["like"])
        if isinstance(known, Section):
            changes = {field: given for field, given in value.items() if field != "like"}
            return {**known.model_dump(), **changes}
    if not isinstance(value, str):
        return value
    if value not in table:
        raise ValueError(f"unknown {what}; known: {', '.join(table)}")
    return table[value]


DeviceChoice = Annotated[Device, BeforeValidator(lambda value: lookup(DEVICES, "device", value))]
