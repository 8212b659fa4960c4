"""How an offline run's rollouts are divided."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rollout_files import LAYOUT, make_head, make_rollout

from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.sources.samples import Facts, SavedRollout
from drafttrain.training.corpus import Corpus


def divided(lengths: list[int], tokens: int) -> list[list[int]]:
    """Lengths in each microbatch."""
    rollouts = [make_rollout(seed, length=length) for seed, length in enumerate(lengths)]
    corpus = Corpus(rollouts, [], LAYOUT, {0: make_head()}, microbatch_tokens=tokens)
    return [[entry.length for entry in part.entries] for part in corpus.training]


@given(st.lists(st.integers(2, 40), max_size=30), st.integers(1, 100))
def test_every_rollout_is_in_one_microbatch_within_the_budget(
    lengths: list[int], tokens: int
) -> None:
    parts = divided(lengths, tokens)
    assert sorted(length for part in parts for length in part) == sorted(lengths)
    assert all(sum(part) <= tokens or len(part) == 1 for part in parts)
    assert all(part == sorted(part) for part in parts)


def test_microbatches_mix_lengths() -> None:
    parts = divided([4] * 40 + [12] * 40, tokens=64)
    mixed = sum(len(set(part)) == 2 for part in parts)
    assert mixed > len(parts) / 2


@given(uses=st.integers(1, 4), microbatches=st.integers(1, 3), first=st.integers(0, 40))
def test_every_step_is_used_equally_often_and_again_soon(
    uses: int, microbatches: int, first: int
) -> None:
    rollouts = [make_rollout(seed, length=4) for seed in range(7)]
    corpus = Corpus(rollouts, [], LAYOUT, {0: make_head()}, microbatch_tokens=4, uses=uses)
    plain = Corpus(rollouts, [], LAYOUT, {0: make_head()}, microbatch_tokens=4)

    def steps(of: Corpus, count: int, start: int = 0) -> list[tuple[int, ...]]:
        found = islice(of.steps(microbatches, first=start, seed=5), count)
        return [tuple(part.index for part in step) for step in found]

    taken = steps(corpus, 60)
    assert steps(corpus, 60 - first, first) == taken[first:]
    # After a block of four is through, all steps but the last four were taken as often as wanted.
    new = (60 - 4) // (4 * uses) * 4
    taken, expected = taken[: 4 + new * uses], steps(plain, 4 + new)
    assert Counter(taken) == Counter(expected[:new] * uses + expected[new:])
    if len(set(expected)) == len(expected):
        for step in expected[:new]:
            places = [place for place, other in enumerate(taken) if other == step]
            assert places[-1] - places[0] < 8 * uses


# A rollout's features are 256 bytes; half of the memory holds the first ones, half the newest.
@pytest.mark.parametrize(("memory", "taught_in_all"), [(0, 24), (500, 24), (1100, 10), (3072, 6)])
def test_features_are_kept_within_the_memory(memory: int, taught_in_all: int) -> None:
    rollouts = [make_rollout(seed, length=8) for seed in range(6)]
    taught: list[str] = []

    def features(saved: list[SavedRollout]) -> list[Rollout]:
        taught.extend(rollout.group for rollout in saved)
        return [rollouts[int(rollout.group)] for rollout in saved]

    saved = [
        SavedRollout(rollout.tokens, rollout.sampled_runs > 0, Facts(group=str(index)))
        for index, rollout in enumerate(rollouts)
    ]
    corpus = Corpus(
        saved, [], LAYOUT, {0: make_head()},
        microbatch_tokens=8, features=features, keep_bytes=memory,
    )  # fmt: skip
    for part in [*corpus.training, *corpus.training]:
        for _ in range(2):  # at once again: the newest is at hand when it fits at all
            (loaded,) = corpus.load(part)
            assert loaded.last_hidden.equal(rollouts[int(part.entries[0].group)].last_hidden)
    assert len(taught) == taught_in_all
