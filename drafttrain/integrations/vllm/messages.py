"""What engine and client say to each other, as JSON."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field, computed_field

from drafttrain.errors import DrafttrainError, InputError

SCHEMA_VERSION = 1


class Message(BaseModel):
    model_config = ConfigDict(frozen=True)


class Acceptance(Message):
    """Counts of verification rounds.

    A round is one step of one request that had draft tokens; ``accepted_per_position[i]`` is in how
    many of them the draft token at depth i was accepted.
    """

    rounds: int = 0
    drafted: int = 0
    accepted_per_position: list[int] = Field(default_factory=list)

    @property
    def accepted(self) -> int:
        return sum(self.accepted_per_position)

    @computed_field  # type: ignore[prop-decorator]
    @property
    def acceptance_length(self) -> float | None:
        """Tokens a round yields, 1 + accepted / rounds; None before the first round."""
        return 1 + self.accepted / self.rounds if self.rounds else None

    @property
    def accepted_by_position(self) -> list[float]:
        """Of the rounds, the part in which the draft token at each depth was accepted."""
        return [accepted / self.rounds for accepted in self.accepted_per_position]


class VersionAcceptance(Acceptance):
    """Acceptance of one drafter version, on requests that it alone has drafted for.

    Requests that were running at a swap are left out: their drafter KV is stale, and only their
    acceptance suffers from it.
    """

    drafter_version: int | None = None
    requests: int = 0


class TapCounters(Message):
    """What the tap has done since the engine started. Counts rollouts unless it says otherwise."""

    capturing: bool = False
    unavailable: str | None = None
    """Why nothing can be captured here; None when it can."""
    written: int = 0
    segments: int = 0
    captured_tokens: int = 0
    """Tokens with features in the written rollouts."""
    dropped: int = 0
    """Lost because the spool was full or unwritable, or the buffers were."""
    damaged: int = 0
    """Dropped because what the engine reported did not add up."""
    skipped: int = 0
    """Not rollouts of the policy on token ids: LoRA, embeddings, multimodal, streamed input."""
    uncaptured: int = 0
    """Ended without a single captured row (capture was off, or the window lay elsewhere)."""
    passed_over: int = 0
    """Not kept, as the settings ask: a fraction of prompt groups, a budget of bytes a second."""
    running: int = 0


class EngineStatus(Message):
    """``GET /drafttrain/status``."""

    schema_version: int = SCHEMA_VERSION
    plugin: str
    """Version of drafttrain in the engine."""
    vllm: str
    engine: str
    method: str | None
    num_draft_tokens: int
    draft_sample_method: str | None
    policy_version: int
    drafter_version: int | None
    """Registry version that drafts; None when the drafter did not come from the registry."""
    drafter_sha: str | None
    swaps: int
    acceptance: Acceptance
    """Since the engine started."""
    acceptance_by_version: list[VersionAcceptance]
    tap: TapCounters
    cpu_sampler_corrected: bool


class Prepared(Message):
    """Whether a worker has read and verified the version it was told to prepare."""

    ready: bool


class SwapResult(Message):
    """``POST /drafttrain/drafter``: what serves now, and what served before."""

    version: int
    previous: int | None
    seconds: float
    sha: str


class Refusal(Message):
    """What was asked for was not done, and why.

    A worker answers with it instead of raising: exceptions do not cross vLLM's process boundaries
    in one piece.
    """

    error: str
    status: int
    """The HTTP status that says so."""

    @classmethod
    def of(cls, error: DrafttrainError) -> Refusal:
        return cls(error=str(error), status=422 if isinstance(error, InputError) else 409)
