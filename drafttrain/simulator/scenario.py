"""What a user describes: policy, cluster, rollouts, drafter and pipeline, in one YAML file.

Unknown keys are refused. Times are seconds, sizes bytes, lengths tokens, unless a field says
otherwise.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field, field_validator, model_validator
from scipy.special import ndtri

from drafttrain.config import Fraction, Seconds, Section, parsed
from drafttrain.control.economics import EngineCost
from drafttrain.errors import ConfigError
from drafttrain.simulator.acceptance import Acceptance
from drafttrain.simulator.hardware import BYTES, DeviceChoice, Efficiency, Engine, Precision, lookup
from drafttrain.simulator.models import DrafterKind, Model

DATA = files("drafttrain.simulator")

# Of a prompt or a response; far above any model's context.
_MOST_TOKENS = 1 << 24
# Of one replica in an RL step: the time of a simulation grows with the square of them.
_MOST_REQUESTS = 1 << 14


class Responses(Section):
    """Response lengths: log-normal up to a cap, at which generation stops, or as measured."""

    median: float = Field(1000.0, gt=0, le=_MOST_TOKENS)
    """Median length if there were no cap."""
    spread: float = Field(0.6, ge=0, le=10)
    """Standard deviation of the logarithm; 0: all alike. Above 1 the tail is heavy."""
    cap: int = Field(1 << 20, ge=1, le=_MOST_TOKENS)
    """The most tokens a response may have."""
    measured: tuple[Annotated[int, Field(ge=1, le=_MOST_TOKENS)], ...] | None = None
    """Lengths of recorded responses, used instead."""

    @model_validator(mode="after")
    def _not_empty(self) -> Self:
        if self.measured is not None and not self.measured:
            raise ValueError("measured is empty")
        return self

    def sample(self, count: int) -> NDArray[np.float64]:
        """`count` lengths at evenly spaced quantiles, ascending; the same at every call."""
        quantiles = (np.arange(count) + 0.5) / count
        if self.measured is not None:
            lengths = np.quantile(self.measured, quantiles, method="inverted_cdf")
        else:
            lengths = self.median * np.exp(self.spread * ndtri(quantiles))
        return np.clip(lengths, 1.0, self.cap)


@cache
def calibration() -> dict[str, Any]:
    """What ``calibration.yaml`` holds: fitted constants, by name."""
    document: dict[str, Any] = yaml.safe_load((DATA / "calibration.yaml").read_text())
    return document


def _engines() -> dict[str, Any]:
    return {"vllm": Engine(**calibration()["engines"]["vllm"]), "ideal": Engine()}


def _responses() -> dict[str, Any]:
    return {name: Responses(**given) for name, given in calibration()["responses"].items()}


class Cluster(Section):
    """Devices and how they are divided."""

    device: DeviceChoice
    gpus: int = Field(ge=1, le=1 << 20)
    tensor_parallel: int = Field(1, ge=1)
    """Devices in one replica of the engine; an MoE's experts are divided among them too."""
    generation_gpus: int | Literal["all", "best"] = "all"
    """Devices that generate: "all" when engines and trainer share them; a number, the others train;
    "best": the division with the shortest step, found for each way of drafting by itself."""
    precision: Precision = "bf16"
    """Of the policy's weights and their arithmetic during generation."""
    kv_precision: Precision = "bf16"
    memory_for_kv: Fraction = 0.85
    """Part of the memory that weights and KV cache may fill together."""

    @model_validator(mode="after")
    def _divides(self) -> Self:
        if self.precision not in self.device.flops:
            raise ValueError(f"precision: the device has no {self.precision} rate")
        generation = self.generation_gpus
        most = self.gpus if isinstance(generation, str) else generation
        if most > self.gpus:
            raise ValueError(f"generation_gpus: {most} of {self.gpus}")
        if most < self.tensor_parallel * (2 if generation == "best" else 1):
            raise ValueError(f"tensor_parallel: {self.tensor_parallel} of {most} devices")
        return self


class Workload(Section):
    """The rollouts of one RL step."""

    prompts: int = Field(ge=1, le=1 << 20)
    samples: int = Field(8, ge=1, le=1 << 20)
    """Responses to each prompt: the prompt group's size."""
    prompt_tokens: int = Field(200, ge=0, le=_MOST_TOKENS)
    responses: Responses = Responses()
    slots: int = Field(1024, ge=1, le=1 << 16)
    """Most requests that run at once in a replica (the engine's ``max_num_seqs``)."""

    @field_validator("responses", mode="before")
    @classmethod
    def _by_name(cls, value: Any) -> Any:
        return lookup(_responses(), "response lengths", value)


class DrafterConfig(Section):
    """How drafts come about, and how many."""

    kind: DrafterKind = "eagle3"
    k: int = Field(3, ge=1, le=16)
    acceptance: Acceptance
    draft_vocab: int = Field(32000, ge=2, le=1 << 24)
    """Rows of an eagle3 drafter's head."""
    model: Model | None = None
    """The draft model, for kind ``draft_model``."""

    @model_validator(mode="after")
    def _has_model(self) -> Self:
        if (self.kind == "draft_model") != (self.model is not None):
            raise ValueError("model: expected with kind draft_model, and only there")
        return self


class Online(Section):
    """Training the drafter beside the RL job."""

    gpu_seconds: Seconds = 0.0
    """GPU time of training on one policy version's rollouts, wherever it runs."""
    swap: Seconds = 0.05
    """Seconds that the engines pause to load a new drafter, once in each RL step."""
    versions: int = Field(50, ge=1, le=10000)
    """RL steps to look ahead."""


class Pipeline(Section):
    """What the RL step consists of besides generation."""

    lag: int = Field(0, ge=0, le=8)
    """Versions that the policy may move on between a rollout's start and its use; 0: synchronous.
    The rollouts of ``lag + 1`` steps are then under way at once."""
    data: Seconds = 0.0
    prepare: Seconds = 0.0
    """Weight synchronisation (refit) and waking the engines."""
    logprob_gpu_seconds: Seconds | None = None
    """Work of the log-prob pass; seconds are this over the training devices. When absent: from the
    model's operations."""
    train_gpu_seconds: Seconds | None = None
    """Work of the training stage, or the name of one in ``calibration.yaml``."""
    training_efficiency: Efficiency = 0.3
    """Part of the device's bf16 (or fp32) rate that training reaches, when work is computed."""

    @field_validator("train_gpu_seconds", mode="before")
    @classmethod
    def _work_by_name(cls, value: Any) -> Any:
        return lookup(calibration()["training"], "training work", value)


class Scenario(Section):
    """One RL job."""

    title: str = ""
    policy: Model
    engine: Engine
    """``vllm``, ``ideal``, the constants, or ``{like: vllm, captured_tokens: 1024}``."""
    engine_cost: EngineCost | None = None
    """A step as fitted from an engine's own timings, or the file that ``EngineCost.save`` wrote;
    replaces the roofline."""
    cluster: Cluster
    workload: Workload
    drafter: DrafterConfig
    pipeline: Pipeline = Pipeline()
    online: Online = Online()

    @field_validator("engine", mode="before")
    @classmethod
    def _engine_by_name(cls, value: Any) -> Any:
        return lookup(_engines(), "engine", value)

    @field_validator("engine_cost", mode="before")
    @classmethod
    def _cost_by_file(cls, value: Any) -> Any:
        return EngineCost.load(value) if isinstance(value, str) else value

    @model_validator(mode="after")
    def _overlaps(self) -> Self:
        cluster, lag = self.cluster, self.pipeline.lag
        if lag and cluster.generation_gpus in ("all", cluster.gpus):
            raise ValueError("pipeline.lag: needs generation_gpus that leave some for training")
        if not lag and cluster.generation_gpus == "best":
            raise ValueError("generation_gpus: best is for pipeline.lag of 1 or more")
        return self

    @model_validator(mode="after")
    def _can_be_simulated(self) -> Self:
        cluster, workload = self.cluster, self.workload
        chosen = cluster.generation_gpus
        replicas = (cluster.gpus if isinstance(chosen, str) else chosen) // cluster.tensor_parallel
        most = _MOST_REQUESTS * replicas
        if workload.prompts * workload.samples > most:
            problem = f"{workload.prompts} x {workload.samples} requests; expected at most {most}"
            raise ValueError(f"workload.prompts: {problem} for {replicas} replicas")
        return self

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.engine_cost is not None:
            return self
        cluster, policy = self.cluster, self.policy
        weights = policy.shared_weights + policy.expert_weights
        each = weights * BYTES[cluster.precision] / cluster.tensor_parallel
        room = cluster.device.memory * cluster.memory_for_kv - each
        if room <= 0:
            problem = f"{each / 1e9:.0f} GB of weights on each device leave no room for KV"
            raise ValueError(f"cluster.tensor_parallel: {problem}")
        share = max(1.0 / cluster.tensor_parallel, 1.0 / policy.kv_heads)
        tokens = room / (policy.kv_width * BYTES[cluster.kv_precision] * share)
        if self.workload.prompt_tokens >= tokens:
            problem = f"{self.workload.prompt_tokens}; the KV cache holds {tokens:.0f} tokens"
            raise ValueError(f"workload.prompt_tokens: {problem}")
        return self


_Section = TypeVar("_Section", bound=Section)


def changed(section: _Section, **changes: Any) -> _Section:
    """A copy of a part of the configuration with some fields changed."""
    return section.model_copy(update=changes)


def load_scenario(path: str | Path) -> Scenario:
    """Read a scenario.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong; names the key.
    """
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(path, "file", f"cannot be read: {error}") from error
    return parse_scenario(text, str(path))


def parse_scenario(text: str, where: str) -> Scenario:
    """As :func:`load_scenario`, from text; `where` stands in messages."""
    return parsed(Scenario, text, where)


def presets() -> list[str]:
    """Names of the scenarios that come with the package."""
    names = (entry.name for entry in (DATA / "presets").iterdir())
    return sorted(name.removesuffix(".yaml") for name in names if name.endswith(".yaml"))


def load_preset(name: str) -> Scenario:
    """A scenario that comes with the package.

    Raises:
        ConfigError: there is none of that name.
    """
    if name not in presets():
        raise ConfigError("--preset", name, f"unknown; known: {', '.join(presets())}")
    return parse_scenario((DATA / "presets" / f"{name}.yaml").read_text(), f"preset {name}")
