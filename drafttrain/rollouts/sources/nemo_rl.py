"""NeMo-RL: the training data its logger writes at every step.

``LOGS/train_data_step10.jsonl``: token_ids, token_loss_mask (1 where the policy sampled),
input_lengths (of the whole sequence), rewards, idx and more, padded on the right to the longest of
the step. Each value is a batch of one, so token ids come as ``[[...]]``
(``nemo_rl/algorithms/grpo.py`` and ``nemo_rl/utils/logger.py``, ``log_batched_dict_as_jsonl``, at
7ea279abfbeb698b092856d0dab61e7cf39bc909).
"""

from __future__ import annotations

from typing import Any

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources.samples import (
    Facts,
    Row,
    Sample,
    Tokens,
    integers,
    mask,
    number,
    take,
)


def recognises(row: Row) -> bool:
    return {"token_ids", "token_loss_mask", "input_lengths"} <= row.keys()


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a field is missing or malformed.
    """
    single = {field: _only(value) for field, value in row.items()}
    tokens = integers(single, "token_ids", where)
    sampled = mask(single, "token_loss_mask", len(tokens), where)
    length = take(single, "input_lengths", int, where)
    if not 0 < length <= len(tokens):
        raise RolloutError(where, "input_lengths", f"{length} of {len(tokens)} tokens")
    facts = Facts(reward=number(single, "rewards", where))
    return [Tokens(tokens[:length], sampled[:length], facts)]


def _only(value: Any) -> Any:
    return value[0] if isinstance(value, list) and len(value) == 1 else value
