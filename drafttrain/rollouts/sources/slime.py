"""slime: its samples, as JSON.

``--save-debug-rollout-data`` writes ``torch.save({"rollout_id", "samples"})``, a pickle, which is
refused; each entry of ``samples`` is a plain dict, and one of them as a line of JSON is what is
read here: tokens, response_length, loss_mask, reward, group_index, index, status
(``slime/observability/rollout_data_utils.py`` and ``slime/utils/types.py``, ``Sample.to_dict``, at
624b824a898ab0ec1fcb4d373004c7f3852bf515).
"""

from __future__ import annotations

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources.samples import (
    Facts,
    Row,
    Sample,
    Tokens,
    integers,
    mask,
    maybe,
    number,
    take,
)

_FINISH_REASONS = {"completed": "stop", "truncated": "length", "aborted": "abort"}


def recognises(row: Row) -> bool:
    return {"tokens", "response_length"} <= row.keys()


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a field is missing or malformed.
    """
    tokens = integers(row, "tokens", where)
    response = take(row, "response_length", int, where)
    if not 0 <= response <= len(tokens):
        raise RolloutError(where, "response_length", f"{response} of {len(tokens)} tokens")
    sampled = [True] * response
    if row.get("loss_mask") is not None:
        sampled = mask(row, "loss_mask", response, where)
    reward = row.get("reward")
    # Several by name are no number; true is one here.
    single = {"reward": +reward} if isinstance(reward, int | float) else {}
    index = maybe(row, "index", int, where)
    facts = Facts(
        rollout_id=None if index is None else str(index),
        finish_reason=_FINISH_REASONS.get(maybe(row, "status", str, where) or ""),
        reward=number(single, "reward", where),
    )
    return [Tokens(tokens, [False] * (len(tokens) - response) + sampled, facts)]
