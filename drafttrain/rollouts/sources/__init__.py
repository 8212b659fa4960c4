"""Saved rollouts of other tools, and plain conversations, as one record.

::

    files ──rows──▶ one format module ──samples──▶ encoding ──▶ SavedRollout

A format is recognised by its columns, so files may have any name. Rows that make no sense are
reported with file and line; they stop the reading unless the user allowed to skip them, and are
counted either way. A spool is not read here: it has features already (:mod:`replay`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

from drafttrain.errors import RolloutError
from drafttrain.rollouts.sources import (
    nemo_rl,
    openrlhf,
    prime_rl,
    slime,
    text,
    token_ids,
    trl,
    verl,
    vllm_batch,
)
from drafttrain.rollouts.sources.encoding import Encoder
from drafttrain.rollouts.sources.files import (
    PICKLED,
    TABLES,
    dataset_files,
    refuse_pickle,
    rows,
)
from drafttrain.rollouts.sources.samples import Sample, SavedRollout

# From the most telling columns to the most general ones.
FORMATS: tuple[ModuleType, ...] = (nemo_rl, slime, verl, openrlhf, trl, token_ids, text)

# Skipped rows whose reason is kept to be shown; the others are only counted.
_REASONS_KEPT = 20


@dataclass
class Reading:
    """What came of reading some paths.

    Attributes:
        rollouts: in the order of files and lines.
        skipped: rows that were passed over.
        reasons: why, for the first of them; each names file and line.
        text_without_specials: rows whose writer had dropped the special tokens.
    """

    rollouts: list[SavedRollout] = field(default_factory=list)
    skipped: int = 0
    reasons: list[str] = field(default_factory=list)
    text_without_specials: int = 0


def read_rollouts(
    paths: Sequence[Path], encoder: Encoder, *, skip_malformed: bool = False
) -> Reading:
    """Read saved rollouts of any known format.

    Args:
        paths: files and folders; a folder stands for all files of a known kind below it.
        skip_malformed: count rows that make no sense instead of stopping at the first.

    Raises:
        RolloutError: a path is missing, a file is damaged or of no known format, there is no
            rollout at all, or a row is malformed and `skip_malformed` is false.
    """
    files = [file for path in paths for file in _files(path)]
    requests = _batch_requests(files)
    reading = Reading()
    for where, result in (pair for file in files for pair in _samples(file, requests, reading)):
        try:
            if isinstance(result, RolloutError):
                raise result
            for sample in result:
                reading.rollouts += encoder.encode(sample, where)
        except RolloutError as error:
            if not skip_malformed:
                raise
            reading.skipped += 1
            if len(reading.reasons) < _REASONS_KEPT:
                reading.reasons.append(str(error))
    if not reading.rollouts:
        names = ", ".join(map(str, paths))
        problem = "none found; expected one row at least"
        if reading.skipped:
            problem += f"; the first of {reading.skipped} skipped: {reading.reasons[0]}"
        raise RolloutError(names, "rollouts", problem)
    return reading


def _files(path: Path) -> Iterator[Path]:
    """The files that a path stands for, in a fixed order."""
    if path.suffix in PICKLED:
        refuse_pickle(path)
    if path.is_file():
        if path.suffix not in TABLES and not prime_rl.recognises(path):
            expected = f"{', '.join(TABLES)} or step_N/rank_R.bin"
            raise RolloutError(path, "file", f"is of no known kind; expected {expected}")
        yield path
        return
    if not path.is_dir():
        raise RolloutError(path, "file", "missing")
    found = False
    for file in _below(path):
        found = True
        yield file
    if not found:
        for pickle in sorted(file for file in path.rglob("*") if file.suffix in PICKLED):
            refuse_pickle(pickle)
        raise RolloutError(path, "folder", "holds no file of a known kind")


def _below(folder: Path) -> Iterator[Path]:
    if (folder / "state.json").is_file():
        yield from dataset_files(folder)
        return
    for entry in sorted(folder.iterdir()):
        if entry.is_dir():
            yield from _below(entry)
        elif entry.suffix in TABLES or prime_rl.recognises(entry):
            yield entry


def _samples(
    file: Path, requests: dict[str, dict[str, Any]], reading: Reading
) -> Iterator[tuple[str, Sequence[Sample] | RolloutError]]:
    if prime_rl.recognises(file):
        yield from prime_rl.samples(file)
        return
    for where, row in rows(file):
        if isinstance(row, RolloutError):
            yield where, row
        elif not vllm_batch.is_request(row):
            try:
                yield where, _convert(row, where, requests, reading)
            except RolloutError as error:
                yield where, error


def _convert(
    row: dict[str, Any], where: str, requests: dict[str, dict[str, Any]], reading: Reading
) -> list[Sample]:
    if vllm_batch.recognises(row):
        return vllm_batch.convert(row, where, requests)
    for format_module in FORMATS:
        if format_module.recognises(row):
            reading.text_without_specials += format_module in (trl, verl)
            convert: Callable[[dict[str, Any], str], list[Sample]] = format_module.convert
            return convert(row, where)
    columns = ", ".join(sorted(row)[:12])
    raise RolloutError(where, "columns", f"{columns}; no known format has these")


def _batch_requests(files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """Bodies of the requests in the input files of batches, by custom_id."""
    requests: dict[str, dict[str, Any]] = {}
    for file in files:
        if file.suffix != ".jsonl":
            continue
        for _, row in rows(file):
            if isinstance(row, RolloutError) or not vllm_batch.is_request(row):
                break  # not such a file
            if isinstance(row["custom_id"], str) and isinstance(row["body"], dict):
                requests[row["custom_id"]] = row["body"]
    return requests


__all__ = ["Encoder", "Reading", "SavedRollout", "read_rollouts"]
