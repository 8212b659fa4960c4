"""What a source yields: one saved sample of a policy, before its text (if it is text) is tokenized.

A format module turns one row of a file into samples and knows nothing else: not where rows come
from (:mod:`files`), not how text becomes tokens (:mod:`encoding`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor

from drafttrain.errors import RolloutError
from drafttrain.rollouts.record import FinishReason, Rollout, sampled_runs

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Facts:
    """What a row says about its sample besides the text; None where it says nothing.

    Attributes:
        rollout_id: as the writer named it.
        group: prompt group; by default the hash of the prompt's tokens.
        domain: data source, environment or task the prompt came from.
        policy_version: the policy version (or RL step) that sampled it.
        temperature: of the sampling.
        finish_reason: "stop", "length" or "abort" (:func:`finish_reason`).
        reward: as the RL job counted it.
    """

    rollout_id: str | None = None
    group: str | None = None
    domain: str | None = None
    policy_version: int | None = None
    temperature: float | None = None
    finish_reason: str | None = None
    reward: float | None = None


@dataclass(frozen=True)
class Tokens:
    """Token ids with a mask: ``generated[t]`` tells whether the policy sampled ``tokens[t]``."""

    tokens: Sequence[int]
    generated: Sequence[bool]
    facts: Facts


@dataclass(frozen=True)
class Text:
    """A prompt and what the policy wrote after it."""

    prompt: str
    completion: str
    facts: Facts


@dataclass(frozen=True)
class Conversation:
    """Chat messages; what the policy wrote are the assistant's from index `first` on."""

    messages: Sequence[dict[str, Any]]
    facts: Facts
    tools: Sequence[dict[str, Any]] | None = None
    first: int = 0


Sample = Tokens | Text | Conversation


@dataclass(frozen=True)
class SavedRollout:
    """A rollout as it was saved: tokens without the policy's features.

    Attributes:
        tokens: int32 [T].
        generated: bool [T]; sampled by the policy, as opposed to given to it.
        facts: with every field that can be known filled in.
    """

    tokens: Tensor
    generated: Tensor
    facts: Facts

    @property
    def length(self) -> int:
        return len(self.tokens)

    @property
    def rollout_id(self) -> str:
        return self.facts.rollout_id or ""

    @property
    def group(self) -> str:
        return self.facts.group or ""

    @property
    def sampled_runs(self) -> Tensor:
        """:func:`sampled_runs` of its tokens."""
        return sampled_runs(self.generated)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first one that the policy sampled."""
        return int(self.generated.int().argmax())

    def with_features(self, last_hidden: Tensor, aux_hidden: Tensor | None) -> Rollout:
        """The rollout with what a teacher computed on all its tokens.

        Args:
            last_hidden: [T, H].
            aux_hidden: [T, A, H], or None.
        """
        facts = self.facts
        captured = torch.ones(self.length, dtype=torch.bool)
        captured[-1] = False  # nothing comes after it that an engine would have computed it for
        whole = bool(self.generated[self.prompt_length :].all())
        return Rollout(
            rollout_id=self.rollout_id,
            group=self.group,
            tokens=self.tokens,
            prompt_length=self.prompt_length,
            captured=captured,
            last_hidden=last_hidden,
            aux_hidden=aux_hidden,
            policy_version=0,
            drafter_version=None,
            temperature=1.0 if facts.temperature is None else facts.temperature,
            finish_reason=facts.finish_reason,
            reward=facts.reward,
            domain=facts.domain,
            generated=None if whole else self.generated,
        )


def take(row: Row, field: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A required field of a row.

    Raises:
        RolloutError: it is missing or of another type; names the field.
    """
    if row.get(field) is None:
        raise RolloutError(where, field, "missing")
    return _checked(row[field], field, kind, where)


def maybe(row: Row, field: str, kind: type | tuple[type, ...], where: str) -> Any:
    """A field of a row, or None when it is absent or null.

    Raises:
        RolloutError: it is of another type; names the field.
    """
    return None if row.get(field) is None else _checked(row[field], field, kind, where)


def finish_reason(row: Row) -> str | None:
    """How a sample ended, or None when the row says nothing, or something that a spool has not.

    Servers have more words for it (``tool_calls``), which is no reason to lose a sample.
    """
    told = row.get("finish_reason")
    return told if told in get_args(FinishReason) else None


def number(row: Row, field: str, where: str) -> float | None:
    """A finite number of a row, or None.

    Raises:
        RolloutError: it is something else; names the field.
    """
    value = maybe(row, field, (int, float), where)
    if value is None:
        return None
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise RolloutError(where, field, f"{found}; expected a finite number")
    return found


def integers(row: Row, field: str, where: str) -> list[int]:
    """A required list of integers.

    Raises:
        RolloutError: it is missing or something else; names the field.
    """
    values: list[int] = take(row, field, list, where)
    if not all(type(value) is int for value in values):
        raise RolloutError(where, field, "expected a list of integers")
    return values


def mask(row: Row, field: str, length: int, where: str) -> list[bool]:
    """A required list of 0 and 1, or false and true, of a known length.

    Raises:
        RolloutError: it is missing or something else; names the field.
    """
    values = take(row, field, list, where)
    if len(values) != length or not all(value in (0, 1) for value in values):
        problem = f"expected {length} entries of 0 or 1, one for each token"
        raise RolloutError(where, field, problem)
    return [bool(value) for value in values]


def _checked(value: Any, field: str, kind: type | tuple[type, ...], where: str) -> Any:
    allowed = kind if isinstance(kind, tuple) else (kind,)
    # JSON's true is a Python int; a mask or a flag is no number.
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        names = " or ".join(part.__name__ for part in allowed)
        raise RolloutError(where, field, f"{value!r:.60}; expected {names}")
    return value
