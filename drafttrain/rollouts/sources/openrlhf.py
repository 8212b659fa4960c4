"""OpenRLHF: what its ``batch_inference`` command wrote.

JSONL of input (the prompt as the policy saw it), output, and reward where a reward model ran
(``openrlhf/cli/batch_inference.py``, last at 6a981c8c^; later versions write no rollouts to disk).
"""

from __future__ import annotations

from drafttrain.rollouts.sources.samples import Facts, Row, Sample, Text, number, take


def recognises(row: Row) -> bool:
    return {"input", "output"} <= row.keys()


def convert(row: Row, where: str) -> list[Sample]:
    """See the module.

    Raises:
        RolloutError: a field is missing or malformed.
    """
    facts = Facts(reward=number(row, "reward", where))
    return [Text(take(row, "input", str, where), take(row, "output", str, where), facts)]
