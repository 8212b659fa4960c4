"""TRL: the completions that ``GRPOTrainer(log_completions=True)`` writes.

``OUTPUT/completions/completions_00010.parquet``: step, prompt, completion, one column of rewards
for each reward function, advantage. Prompt and completion are text decoded without special tokens
(``trl/trainer/grpo_trainer.py``, ``log`` and ``_generate_and_score_completions``, at
f2cd57710ae345ea6428ae95363267fcf38a3dc8).
"""

from __future__ import annotations

from drafttrain.rollouts.sources.samples import Facts, Row, Sample, Text, take


def recognises(row: Row) -> bool:
    return {"step", "prompt", "completion", "advantage"} <= row.keys()


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a column is missing or malformed.
    """
    facts = Facts(policy_version=take(row, "step", int, where))
    return [Text(take(row, "prompt", str, where), take(row, "completion", str, where), facts)]
