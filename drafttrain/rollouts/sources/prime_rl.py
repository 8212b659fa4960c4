"""prime-rl: the micro batches its orchestrator hands to the trainer on a shared file system.

``OUTPUT/rollouts/step_10/rank_0.bin``: a msgpack array of micro batches, each an array of fields
by position, absent ones at the end left out: input_ids, loss_mask (true where the policy sampled),
advantages, inference_logprobs, position_ids, sequence_lengths, temperatures, env_names, ... Several
samples are packed into one micro batch; padding at its end has the environment ""
(``src/prime_rl/transports/rollouts/``, ``types.py`` and ``filesystem.py``, at
559b44772e471d1538537b8805cc77f3824a5e64).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgpack

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources.samples import Facts, Sample, Tokens, integers, mask, number, take

_FIELDS = (
    "input_ids",
    "loss_mask",
    "advantages",
    "inference_logprobs",
    "position_ids",
    "sequence_lengths",
    "temperatures",
    "env_names",
)
_STEP = re.compile(r"step_(\d{1,9})")


def recognises(path: Path) -> bool:
    return path.suffix == ".bin" and bool(_STEP.fullmatch(path.parent.name))


def samples(path: Path) -> Iterator[tuple[str, list[Sample] | RolloutError]]:
    """Each micro batch of a file: where it stands, and its samples or what is wrong with it.

    Raises:
        RolloutError: the file is not msgpack.
    """
    match = _STEP.fullmatch(path.parent.name)
    try:
        batches: Any = msgpack.unpackb(path.read_bytes(), strict_map_key=False)
    except (OSError, ValueError, msgpack.UnpackException) as error:
        raise RolloutError(path, "file", f"is not whole msgpack: {error}") from error
    if not isinstance(batches, list):
        raise RolloutError(path, "file", "expected a list of micro batches")
    for place, batch in enumerate(batches, start=1):
        where = f"{path}:{place}"
        try:
            yield where, _unpack(batch, int(match[1]) if match else None, where)
        except RolloutError as error:
            yield where, error


def _unpack(batch: Any, step: int | None, where: str) -> list[Sample]:
    if not isinstance(batch, list) or len(batch) < len(_FIELDS):
        raise RolloutError(where, "micro batch", f"expected an array of {', '.join(_FIELDS)}, ...")
    row = dict(zip(_FIELDS, batch, strict=False))
    tokens = integers(row, "input_ids", where)
    sampled = mask(row, "loss_mask", len(tokens), where)
    lengths = integers(row, "sequence_lengths", where)
    temperatures = take(row, "temperatures", list, where)
    environments = take(row, "env_names", list, where)
    if min(lengths, default=0) < 1 or sum(lengths) != len(tokens):
        raise RolloutError(where, "sequence_lengths", f"do not add up to {len(tokens)} tokens")
    if len(temperatures) != len(tokens) or len(environments) != len(tokens):
        raise RolloutError(where, "temperatures and env_names", "expected one for each token")
    found: list[Sample] = []
    start = 0
    for length in lengths:
        end = start + length
        while end > start and environments[end - 1] == "" and not sampled[end - 1]:
            end -= 1  # padding
        if any(sampled[start:end]):
            first = start + sampled[start:end].index(True)
            sampling = {"temperatures": temperatures[first]}
            take(sampling, "temperatures", (int, float), where)
            facts = Facts(
                domain=str(environments[first]) or None,
                policy_version=step,
                temperature=number(sampling, "temperatures", where),
            )
            found.append(Tokens(tokens[start:end], sampled[start:end], facts))
        start += length
    return found
