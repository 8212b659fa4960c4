"""Which tokens a drafter can draft."""

from __future__ import annotations

from dataclasses import replace

import making
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.control.acceptance import estimate_acceptance
from drafttrain.drafters import Eagle3Drafter
from drafttrain.drafters.vocabulary import choose_vocabulary
from drafttrain.errors import RolloutError

POLICY = making.policy_shape()
ROLLOUTS = making.rollouts(POLICY, 6)


@given(st.integers(1, POLICY.vocab_size))
def test_no_other_choice_covers_more(size: int) -> None:
    chosen = choose_vocabulary(ROLLOUTS, POLICY.vocab_size, size)
    sampled = torch.cat([rollout.tokens[rollout.prompt_length :] for rollout in ROLLOUTS]).long()
    counts = torch.bincount(sampled, minlength=POLICY.vocab_size)
    assert chosen.ids.tolist() == sorted({*chosen.ids.tolist()})
    assert len(chosen.ids) == size
    best = counts.sort(descending=True).values[:size].sum()
    assert int(counts[chosen.ids].sum()) == int(best)
    assert chosen.coverage == pytest.approx(float(best / counts.sum()))


def test_the_whole_vocabulary_covers_everything() -> None:
    assert choose_vocabulary(ROLLOUTS, POLICY.vocab_size, POLICY.vocab_size).coverage == 1.0


@pytest.mark.parametrize("size", [0, POLICY.vocab_size + 1])
def test_impossible_sizes_are_refused(size: int) -> None:
    with pytest.raises(RolloutError, match="draft vocabulary"):
        choose_vocabulary(ROLLOUTS, POLICY.vocab_size, size)


def test_what_a_tool_said_does_not_count() -> None:
    rollout = ROLLOUTS[0]
    generated = torch.arange(rollout.length) >= rollout.length - 2
    mixed = replace(rollout, generated=generated)
    sampled = mixed.tokens[-2:].long()
    chosen = choose_vocabulary([mixed], POLICY.vocab_size, len(sampled.unique()))
    assert chosen.ids.tolist() == sorted({*sampled.tolist()})
    assert chosen.coverage == 1.0


def test_a_token_the_policy_does_not_have_is_refused() -> None:
    with pytest.raises(RolloutError, match=ROLLOUTS[0].rollout_id):
        choose_vocabulary(ROLLOUTS[:1], int(ROLLOUTS[0].tokens.max()), 1)


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(RolloutError, match="no sampled tokens"):
        choose_vocabulary([], POLICY.vocab_size, 4)


@pytest.mark.parametrize("method", ["greedy", "probabilistic"])
def test_what_cannot_be_drafted_is_not_accepted(method: str) -> None:
    """A head over one token that nobody sampled accepts nothing; over all, as without."""
    torch.manual_seed(0)
    heads = {0: making.policy_head(POLICY)}
    unused = sorted({*range(POLICY.vocab_size)} - {t for r in ROLLOUTS for t in r.tokens.tolist()})
    rollouts = ROLLOUTS
    if not unused:
        unused = [int(ROLLOUTS[0].tokens[3])]
        rollouts = [r for r in ROLLOUTS if unused[0] not in r.tokens.tolist()]
    ids = torch.tensor(unused[:1])
    drafter = Eagle3Drafter.initialise(POLICY, layer_ids=making.LAYERS, draft_ids=ids)
    layout = making.layout(POLICY)
    estimate = estimate_acceptance(drafter, rollouts, layout, heads, k=2, method=method)
    assert estimate.acceptance_length == 1.0
