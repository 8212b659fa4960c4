"""How an offline run's rollouts are divided."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from rollout_files import LAYOUT, make_head, make_rollout

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
