"""From the paths a user names to a corpus: a spool as it is, other rollouts through the teacher.

And to a draft vocabulary, for which their tokens are enough.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torch import Tensor

from drafttrain.config import PretrainConfig
from drafttrain.drafters.policy import PolicyShape, load_tokenizer
from drafttrain.drafters.vocabulary import choose_vocabulary
from drafttrain.errors import RolloutError, SpoolError
from drafttrain.outputs import writing
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.replay import Replay
from drafttrain.rollouts.sources import Encoder, Reading, SavedRollout, read_rollouts
from drafttrain.rollouts.spool import SpoolWriter
from drafttrain.training.corpus import Corpus
from drafttrain.training.teacher import Teacher, TransformersTeacher

Say = Callable[[str], None]


class StartTeacher(Protocol):
    """Starts a teacher that is not transformers'."""

    def __call__(
        self, folder: Path, layer_ids: Sequence[int], *, longest: int, dtype: str
    ) -> Teacher:
        """For rollouts of at most ``longest`` tokens."""


# A cache is a spool with the first of these in it, and without the second, once it is whole.
_MARKER, _UNFINISHED = "features.json", "features.unfinished"


@dataclass(frozen=True)
class Inputs:
    """Where the rollouts and their features come from.

    Attributes:
        target: the policy's folder.
        rollouts: one spool, or files and folders of any known format.
        skip_malformed: count rows that make no sense instead of stopping.
        temperature: of rollouts that do not tell theirs.
        cache: spool folder to keep computed features in; None streams them.
        policy_dtype, device_map: of the policy, as transformers takes them.
        start_teacher: what computes features instead of transformers.
    """

    target: Path
    rollouts: Sequence[Path]
    skip_malformed: bool = False
    temperature: float = 1.0
    cache: Path | None = None
    policy_dtype: str = "auto"
    device_map: str | None = None
    start_teacher: StartTeacher | None = None


@dataclass(frozen=True)
class Opened:
    """A corpus, and what the memory plan and the state want to know of it.

    Attributes:
        corpus: the rollouts.
        digest: of their tokens.
        policy_bytes: of the policy in memory; 0 when the features were there.
    """

    corpus: Corpus
    digest: str
    policy_bytes: int


def open_corpus(
    inputs: Inputs,
    layer_ids: Sequence[int],
    config: PretrainConfig,
    say: Say = lambda sentence: None,
    *,
    normed: bool = True,
) -> Opened:
    """Read, tokenize and divide the rollouts; load the policy if their features are missing.

    Args:
        layer_ids: that the drafter reads.
        normed: the last hidden state is wanted after the policy's final norm.
        say: hears what a person should know, a sentence at a time.

    Raises:
        RolloutError, CheckpointError: the rollouts or the policy are wrong.
        SpoolError: the cache cannot be written.
    """
    if (spool := _spool_of(inputs)) is not None:
        return _open_spool(spool, config)
    reading = read_inputs(inputs, say)
    identity = _cache_identity(inputs, reading, layer_ids, normed)
    if inputs.cache is not None and _is_complete(inputs, identity):
        say(f"features: from {inputs.cache}")
        return _open_spool(inputs.cache, config)
    teacher = _start_teacher(inputs, reading, layer_ids, normed)
    corpus = Corpus.of_saved(
        reading.rollouts,
        teacher,
        microbatch_tokens=config.microbatch_tokens,
        holdout_fraction=config.holdout_fraction,
        keep_bytes=0 if inputs.cache else config.feature_memory,
        uses=config.uses_per_teaching,
        seed=config.training.seed,
    )
    tokens = sum(rollout.length for rollout in reading.rollouts)
    if inputs.cache is None:
        size = readable(tokens * teacher.bytes_per_token)
        say(f"features: streamed; on disk they would be {size}")
        return Opened(corpus, _digest(reading), teacher.weight_bytes)
    _write_cache(inputs.cache, corpus, teacher, tokens * teacher.bytes_per_token, say)
    _mark_complete(inputs, identity)
    return _open_spool(inputs.cache, config)


def choose_draft_ids(inputs: Inputs, size: int, say: Say = lambda sentence: None) -> Tensor:
    """A draft vocabulary for the rollouts: int64 [size], ascending.

    Raises:
        RolloutError, CheckpointError: the rollouts, the policy or the size are wrong.
    """
    rollouts: Iterable[Rollout | SavedRollout]
    if (spool := _spool_of(inputs)) is not None:
        replay = Replay(spool)
        replay.refresh()
        rollouts = [*replay.training, *replay.held_out]  # which of them is not settled yet
    else:
        rollouts = read_inputs(inputs, say).rollouts
    vocab_size = PolicyShape.from_folder(inputs.target).vocab_size
    vocabulary = choose_vocabulary(rollouts, vocab_size, size)
    say(f"draft vocabulary: {size} tokens hold {vocabulary.coverage:.2%} of those sampled")
    return vocabulary.ids


def _spool_of(inputs: Inputs) -> Path | None:
    spools = [path for path in inputs.rollouts if (path / "segments").is_dir()]
    if spools and len(inputs.rollouts) > 1:
        raise RolloutError(spools[0], "rollouts", "a spool is read alone; give no other path")
    return spools[0] if spools else None


def _start_teacher(
    inputs: Inputs, reading: Reading, layer_ids: Sequence[int], normed: bool
) -> Teacher:
    if inputs.start_teacher is not None:
        longest = max(rollout.length for rollout in reading.rollouts)
        return inputs.start_teacher(
            inputs.target, layer_ids, longest=longest, dtype=inputs.policy_dtype
        )
    return TransformersTeacher(
        inputs.target,
        layer_ids,
        dtype=inputs.policy_dtype,
        device_map=inputs.device_map,
        normed=normed,
    )


def _open_spool(path: Path, config: PretrainConfig) -> Opened:
    corpus = Corpus.of_spool(
        path,
        microbatch_tokens=config.microbatch_tokens,
        holdout_fraction=config.holdout_fraction,
        seed=config.training.seed,
    )
    digest = hashlib.sha256()
    for part in (*corpus.training, *corpus.held_out):
        for entry in part.entries:
            digest.update(entry.tokens.numpy().tobytes())
    return Opened(corpus, digest.hexdigest(), policy_bytes=0)


def read_inputs(inputs: Inputs, say: Say = lambda sentence: None) -> Reading:
    """Read and tokenize the rollouts of a policy that are no spool.

    Raises:
        RolloutError, CheckpointError: the rollouts or the policy are wrong.
    """
    shape = PolicyShape.from_folder(inputs.target)
    encoder = Encoder(
        lambda: load_tokenizer(inputs.target),
        shape.vocab_size,
        shape.max_length,
        inputs.temperature,
    )
    reading = read_rollouts(inputs.rollouts, encoder, skip_malformed=inputs.skip_malformed)
    tokens = sum(rollout.length for rollout in reading.rollouts)
    say(f"rollouts: {len(reading.rollouts)}, {tokens} tokens")
    if reading.skipped:
        say(f"skipped: {reading.skipped} malformed, the first: {'; '.join(reading.reasons[:3])}")
    if reading.text_without_specials:
        count = reading.text_without_specials
        say(f"note: {count} rollouts are text whose writer had dropped the special tokens")
    return reading


def _digest(reading: Reading) -> str:
    digest = hashlib.sha256()
    for rollout in reading.rollouts:
        digest.update(rollout.tokens.numpy().tobytes())
        digest.update(rollout.generated.numpy().tobytes())
    return digest.hexdigest()


def _cache_identity(
    inputs: Inputs, reading: Reading, layer_ids: Sequence[int], normed: bool
) -> dict[str, object]:
    weights = sorted(inputs.target.glob("*.safetensors"))
    return {
        "policy": [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in weights],
        "policy_dtype": inputs.policy_dtype,
        "layer_ids": list(layer_ids),
        "normed": normed,
        "rollouts": _digest(reading),
    }


def _is_complete(inputs: Inputs, identity: dict[str, object]) -> bool:
    """Whether the cache holds these features.

    Raises:
        RolloutError: it holds others.
    """
    assert inputs.cache is not None
    marker = inputs.cache / _MARKER
    if not marker.exists() or (inputs.cache / _UNFINISHED).exists():
        return False
    if json.loads(marker.read_text()) != identity:
        problem = "holds features of other rollouts or of another policy; name another folder"
        raise RolloutError(inputs.cache, "cache", problem)
    return True


def _mark_complete(inputs: Inputs, identity: dict[str, object]) -> None:
    assert inputs.cache is not None
    with writing(inputs.cache, "cache"):
        (inputs.cache / _MARKER).write_text(json.dumps(identity) + "\n")
        (inputs.cache / _UNFINISHED).unlink()


def _write_cache(path: Path, corpus: Corpus, teacher: Teacher, size: int, say: Say) -> None:
    """Write all features as a spool, which any later run can read without the policy."""
    unfinished = path / _UNFINISHED
    if (path / "segments").exists() and not unfinished.exists():
        raise RolloutError(path, "cache", "is a spool of something else; name another folder")
    shutil.rmtree(path / "segments", ignore_errors=True)
    with writing(path, "cache"):
        path.mkdir(parents=True, exist_ok=True)
        unfinished.touch()
    writer = SpoolWriter(path, "teacher")
    free = shutil.disk_usage(path).free
    say(f"features: {readable(size)} go to {path}, where {readable(free)} are free")
    if size > free:
        raise SpoolError(
            f"{path}: features need {readable(size)}, {readable(free)} are free; leave out --cache"
        )
    writer.write_head(teacher.head)
    for part in (*corpus.training, *corpus.held_out):
        writer.write(corpus.load(part), corpus.layout)


def readable(size: int) -> str:
    """A number of bytes for a person."""
    amount, unit = float(size), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if amount < 1024 or unit == "TiB":
            break
        amount /= 1024
    return f"{amount:.1f} {unit}" if unit != "B" else f"{size} B"
