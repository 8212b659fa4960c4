"""The typed configuration of the sidecar: one YAML file, unknown keys refused.

Every knob has one default, here, with its unit.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar
from urllib.parse import urlsplit

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from drafttrain.errors import ConfigError, InputError

ObjectiveName = Literal[
    "soft_cross_entropy", "kl", "reverse_kl", "jsd", "tv", "lk", "hard_cross_entropy"
]
Precision = Literal["auto", "float32", "bfloat16"]
Fraction = Annotated[float, Field(ge=0, le=1)]
Seconds = Annotated[float, Field(ge=0, le=1e9)]


def engine_url(text: str) -> str:
    """`text`, if it is the URL of a server.

    Raises:
        ValueError: it is none, and says what one looks like.
    """
    try:
        parts = urlsplit(text)
        sound = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:
        sound = False
    if not sound or not text.isprintable() or " " in text:
        raise ValueError("expected a URL as http://127.0.0.1:8000")
    return text


EngineURL = Annotated[str, AfterValidator(engine_url)]
# What every generator takes: torch's, Python's, and numpy's in an engine.
Seed = Annotated[int, Field(ge=0, lt=1 << 32)]


class Section(BaseModel):
    """A part of the configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class TrainingConfig(Section):
    """How the drafter learns."""

    objective: ObjectiveName = "soft_cross_entropy"
    """What each of them is stands in ``training/objectives.py``; docs/drafters.md compares them in
    an engine."""
    draft_tokens: int = Field(3, ge=1, le=16)
    """Depths of training-time test, and k of the acceptance estimate. Set it to the engine's k."""
    depth_decay: float = Field(1.0, gt=0, le=1)
    """Weight of depth j is ``depth_decay ** j``."""
    staleness_decay: float = Field(1.0, gt=0, le=1)
    """Weight of a rollout n policy versions behind the newest is this to the n."""
    rejected_weight: float = Field(1.0, gt=0)
    """Weight of tokens at which the engine rejected a draft; that of all others is 1."""
    learning_rate: float | None = Field(None, gt=0)
    """When absent, 0.4 divided by the drafter's width: 1e-4 at 4,096, 3.1e-3 at 128."""
    average_decay: float = Field(0.95, ge=0, lt=1)
    """The sidecar publishes a moving average of the weights; this much of it stays at each step."""
    warmup_steps: int = Field(20, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    feature_noise: float = Field(0.0, ge=0)
    """Noise added to the policy's features, relative to their root mean square. It keeps a drafter
    from learning few rollouts by heart; without effect on kinds that read no features."""
    gradient_clip: float = Field(1.0, gt=0)
    tokens_per_step: int = Field(2048, ge=1)
    """Rollout tokens in one optimizer step."""
    seed: Seed = 0
    precision: Precision = "auto"
    """What is computed in; the drafter's own weights stay float32. "auto" is bfloat16 on a GPU and
    float32 on a CPU; on one that multiplies in bfloat16, "bfloat16" is about twice as fast."""
    train_head: bool = True
    """Whether a drafter's own output head is trained, or stays as it is."""
    lora_rank: int | None = Field(None, ge=1)
    """Draft models: train low-rank additions (LoRA) of this rank instead of all weights."""
    export_dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    """Dtype of published weights; the engine's own."""


class ReplayConfig(Section):
    """Which rollouts are kept and which are held out."""

    max_bytes: int = Field(8 << 30, gt=0)
    """Spool segments kept; the oldest beyond this are deleted."""
    holdout_fraction: Fraction = 0.125
    """Prompt groups held out of training for the gate."""
    max_staleness: int | None = Field(8, ge=0)
    """Rollouts more than this many policy versions old are not trained on."""
    min_rollouts: int = Field(32, ge=1)
    """Training starts once this many are in the spool."""


class GateConfig(Section):
    """When a candidate replaces the serving drafter."""

    margin: float = Field(0.02, ge=0)
    """Gain in acceptance length that the confidence interval must clear."""
    level: Fraction = 0.9
    """Confidence level of that interval."""
    held_out_rollouts: int = Field(64, ge=1)
    """Newest held-out rollouts the two drafters are compared on."""
    steps_between: int = Field(25, ge=1)
    """Optimizer steps between two candidates; more where judging, publishing and saving one would
    else take over a third of the time."""
    draft_sample_method: Literal["greedy", "probabilistic"] = "probabilistic"
    """How the engine drafts."""


class PretrainConfig(Section):
    """Offline training, from saved rollouts."""

    training: TrainingConfig = TrainingConfig()
    steps: int = Field(1000, ge=1)
    """Optimizer steps at most."""
    microbatch_tokens: int = Field(1024, ge=1)
    """Rollout tokens that go through policy and drafter at once; a step adds up several."""
    evaluate_every: int = Field(50, ge=1)
    """Steps between two held-out estimates; the run's state is saved with each."""
    holdout_fraction: Fraction = 0.125
    """Prompt groups held out of training."""
    held_out_rollouts: int = Field(128, ge=1)
    """Of them, how many the estimates during training look at, or, of long ones, as many as have
    half of the tokens trained on since the last estimate; the final one looks at all."""
    patience: int = Field(4, ge=1)
    """Estimates in a row without gain after which the learning rate begins its final decay."""
    min_gain: float = Field(0.01, ge=0)
    """Acceptance length that counts as gain."""
    draft_sample_method: Literal["greedy", "probabilistic"] = "probabilistic"
    """How the engine drafts."""
    feature_memory: int = Field(4 << 30, ge=0)
    """Bytes of features kept in memory, so that later epochs need not compute them again."""
    uses_per_teaching: int = Field(3, ge=1)
    """How often a step is trained on soon after a teacher has computed its features, so that one
    slower than the step keeps up."""

    @property
    def microbatches_per_step(self) -> int:
        return max(1, round(self.training.tokens_per_step / self.microbatch_tokens))


class SidecarConfig(Section):
    """Everything the sidecar needs to know."""

    target: Path
    """The policy's folder; only its ``config.json`` is read."""
    spool: Path
    registry: Path
    registry_name: str = "drafter"
    keep_versions: int = Field(100, ge=2)
    """Versions kept in the registry; older ones that no pointer names are removed."""
    state: Path
    """Where trainer state and the event log are kept; a restart continues from here."""
    drafter: Path | None = None
    """Drafter to start from when the registry is empty; needed only then."""
    engines: list[EngineURL] = []
    """URLs of the engines whose drafter is kept fresh."""
    token_file: Path | None = None
    """File with the engines' bearer token."""
    threads: int | None = Field(None, ge=1, le=4096)
    """CPU threads for training; all when absent."""
    passes_per_rollout: float = Field(8.0, gt=0)
    """Training waits for new rollouts once it has seen each token about this often."""
    training: TrainingConfig = TrainingConfig()
    replay: ReplayConfig = ReplayConfig()
    gate: GateConfig = GateConfig()


def load_config(path: str | Path) -> SidecarConfig:
    """Read a sidecar configuration.

    Raises:
        ConfigError: the file is missing, is not YAML, or a key or value is wrong; names the key.
    """
    try:
        text = Path(path).read_text()
    except OSError as error:
        raise ConfigError(path, "file", f"cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(path, "file", f"is not YAML: {error}") from error
    return parsed(SidecarConfig, text, path)


_Section = TypeVar("_Section", bound=Section)


def parsed(section: type[_Section], text: str, where: str | Path) -> _Section:
    """A section of the configuration from YAML.

    Raises:
        ConfigError: not YAML, or a key or value is wrong; blames `where` and names the key.
    """
    try:
        document: Any = yaml.safe_load(text)
    except RecursionError as error:
        raise ConfigError(where, "file", "is nested too deeply") from error
    except (yaml.YAMLError, ValueError) as error:  # of a date that is none, say
        problem = " ".join(str(error).split())
        raise ConfigError(where, "file", f"is not YAML: {problem}") from error
    if not isinstance(document, dict):
        raise ConfigError(where, "file", "expected a mapping of keys")
    return validated(section, document, where)


def validated(section: type[_Section], document: dict[str, Any], where: str | Path) -> _Section:
    """A section of the configuration from a mapping of keys.

    Raises:
        ConfigError: a key or value is wrong; blames `where` and names the key.
    """
    try:
        return section.model_validate(document)
    except ValidationError as error:
        raise explain(error, where, ConfigError) from error


def explain(error: ValidationError, where: str | Path, kind: type[InputError]) -> InputError:
    """The first mistake of a validation error, as one line for the user."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"]) or "file"
    if first["type"] == "extra_forbidden":
        return kind(where, field, "unknown key")
    return kind(where, field, f"{first['msg']} (got {first['input']!r:.80})")
