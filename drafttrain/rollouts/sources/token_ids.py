"""Rows that hold token ids: this project's own JSONL, and datasets prepared for training.

====================================  ==============================================================
columns                               meaning
====================================  ==============================================================
``prompt_token_ids``,                 a rollout; ``completion_mask`` (0 or 1 for each completion
``completion_token_ids``              token) when some of it was not sampled: tool outputs, say
``input_ids`` or ``token_ids``        a whole sequence, with ``loss_mask``, ``assistant_masks`` or
                                      ``completion_mask``, or ``labels`` with -100 where not sampled
====================================  ==============================================================
"""

from __future__ import annotations

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources.samples import (
    Facts,
    Row,
    Sample,
    Tokens,
    finish_reason,
    integers,
    mask,
    maybe,
    number,
    take,
)

_MASKS = ("loss_mask", "assistant_masks", "completion_mask")
# The value that transformers and its relatives give to labels that are not trained on.
_IGNORED_LABEL = -100


def recognises(row: Row) -> bool:
    return "prompt_token_ids" in row or bool({"input_ids", "token_ids"} & row.keys())


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a column is missing or malformed.
    """
    if "prompt_token_ids" in row:
        return [_rollout(row, where)]
    return [_sequence(row, where)]


def facts(row: Row, where: str) -> Facts:
    """What a row says under this project's own names.

    Raises:
        RolloutError: a field is of another type.
    """
    version = maybe(row, "policy_version", int, where)
    if version is not None and version < 0:
        raise RolloutError(where, "policy_version", f"{version}; expected 0 or more")
    name = maybe(row, "id", (str, int), where)
    group = maybe(row, "group", (str, int), where)
    return Facts(
        rollout_id=None if name is None else str(name),
        group=None if group is None else str(group),
        domain=maybe(row, "domain", str, where),
        policy_version=version,
        temperature=number(row, "temperature", where),
        finish_reason=finish_reason(row),
        reward=number(row, "reward", where),
    )


def _rollout(row: Row, where: str) -> Tokens:
    prompt = integers(row, "prompt_token_ids", where)
    completion = integers(row, "completion_token_ids", where)
    sampled = [True] * len(completion)
    if row.get("completion_mask") is not None:
        sampled = mask(row, "completion_mask", len(completion), where)
    return Tokens([*prompt, *completion], [False] * len(prompt) + sampled, facts(row, where))


def _sequence(row: Row, where: str) -> Tokens:
    tokens = integers(row, "input_ids" if "input_ids" in row else "token_ids", where)
    for name in _MASKS:
        if row.get(name) is not None:
            return Tokens(tokens, mask(row, name, len(tokens), where), facts(row, where))
    labels = take(row, "labels", list, where)
    if len(labels) != len(tokens):
        raise RolloutError(where, "labels", f"{len(labels)} entries for {len(tokens)} tokens")
    return Tokens(tokens, [label != _IGNORED_LABEL for label in labels], facts(row, where))
