"""verl: the generations that ``trainer.rollout_data_dir`` collects.

``DIR/<step>.jsonl``: input, output, gts, score, step, and what the reward function adds. Input and
output are text decoded without special tokens (``verl/trainer/ppo/ray_trainer.py``,
``_dump_generations`` and ``_log_rollout_data``, at b178a3cd56f58b2d502255daba591e92833930a7).

A ``DataProto`` written by ``save_to_disk`` is a pickle (``verl/protocol.py``) and is refused.
"""

from __future__ import annotations

from drafttrain.rollouts.sources.samples import Facts, Row, Sample, Text, maybe, number, take


def recognises(row: Row) -> bool:
    return {"input", "output", "score", "step"} <= row.keys()


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a field is missing or malformed.
    """
    facts = Facts(
        rollout_id=maybe(row, "request_id", str, where),
        domain=maybe(row, "data_source", str, where),
        policy_version=take(row, "step", int, where),
        reward=number(row, "score", where),
    )
    return [Text(take(row, "input", str, where), take(row, "output", str, where), facts)]
