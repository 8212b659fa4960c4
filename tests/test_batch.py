"""A batch: what its rollouts hold, laid end to end, and where rounds start in it."""

from __future__ import annotations

import itertools
from dataclasses import replace

import making
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from drafttrain.drafters.batch import ROW_MULTIPLE, make_batch, pad_rows, split_by_tokens

POLICY = making.policy_shape()
LAYOUT = making.layout(POLICY)
HEAD = making.policy_head(POLICY)


def test_each_rollout_is_found_between_its_offsets() -> None:
    greedy, masked, told = making.rollouts(POLICY, 3)
    generated = torch.arange(masked.length) >= masked.prompt_length
    generated[6:8] = False
    rejected = torch.arange(told.length) % 3 == 0
    rollouts = [
        replace(greedy, temperature=0.0),
        replace(masked, temperature=0.7, generated=generated),
        replace(told, temperature=1.3, rejected=rejected),
    ]
    batch = make_batch(rollouts, LAYOUT, HEAD)
    assert batch.temperatures.tolist() == pytest.approx([1.0, 0.7, 1.3]), "logits are never over 0"
    assert batch.aux_hidden is not None
    assert batch.rejected is not None
    assert batch.offsets[-1] == len(batch.tokens)
    for index, rollout in enumerate(rollouts):
        part = slice(*batch.offsets[index : index + 2].tolist())
        assert torch.equal(batch.tokens[part], rollout.tokens.long())
        assert torch.equal(batch.captured[part], rollout.captured)
        assert torch.equal(batch.last_hidden[part], rollout.last_hidden)
        assert torch.equal(batch.aux_hidden[part], rollout.aux_hidden)
        assert torch.equal(batch.runs[part], rollout.sampled_runs)
        assert batch.positions[part].tolist() == list(range(rollout.length))
        assert set(batch.rollout_of[part].tolist()) == {index}
        assert torch.equal(batch.rejected[part], rejected) == (index == 2)
    assert not batch.rejected[: batch.offsets[2]].any()
    assert batch.engine_hidden is batch.last_hidden
    plain = make_batch([greedy, replace(told, aux_hidden=None, rejected=None)], LAYOUT, HEAD)
    assert plain.aux_hidden is plain.rejected is plain.generated is None
    assert torch.equal(plain.runs, torch.cat([greedy.sampled_runs, told.sampled_runs]))


def test_states_before_the_final_norm_are_normed_and_kept() -> None:
    rollouts, layout = making.rollouts(POLICY, 2), replace(LAYOUT, last_hidden_normed=False)
    head = replace(HEAD, final_norm=torch.rand(POLICY.hidden_size), norm_eps=0.1)
    batch = make_batch(rollouts, layout, head)
    before = torch.cat([rollout.last_hidden for rollout in rollouts])
    assert torch.equal(batch.engine_hidden, before)
    expected = F.rms_norm(before, (POLICY.hidden_size,), head.final_norm, head.norm_eps)
    torch.testing.assert_close(batch.last_hidden, expected)
    with pytest.raises(ValueError, match="final norm"):
        make_batch(rollouts, layout, replace(head, final_norm=None))


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(0, 9)), min_size=1, max_size=3),
    st.sets(st.integers(0, 20), max_size=6),
    st.sets(st.integers(0, 30), max_size=4) | st.none(),
)
def test_rounds_start_where_both_next_tokens_were_sampled(
    sizes: list[tuple[int, int]], missing: set[int], by_others: set[int] | None
) -> None:
    prompts, lengths = [p for p, _ in sizes], [p + completion for p, completion in sizes]
    batch = making.bare_batch(prompts, lengths)
    for index in missing & set(range(sum(lengths))):
        batch.captured[index] = False
    places = [(b, place) for b, length in enumerate(lengths) for place in range(length)]
    sampled = [place >= prompts[b] for b, place in places]
    if by_others is not None:
        sampled = [s and index not in by_others for index, s in enumerate(sampled)]
        batch = replace(batch, generated=torch.tensor(sampled))
    slots = [
        index
        for index, (b, place) in enumerate(places)
        if index not in missing and place + 2 < lengths[b]
    ]
    assert batch.slots.tolist() == slots
    assert batch.rounds.tolist() == [s for s in slots if sampled[s + 1] and sampled[s + 2]]


@settings(deadline=None)
@given(st.lists(st.integers(3, 12), max_size=9), st.integers(1, 40))
def test_parts_are_as_full_as_their_limit_allows(lengths: list[int], tokens: int) -> None:
    template = making.rollouts(POLICY, 1)[0]
    rollouts = [replace(template, tokens=torch.zeros(length)) for length in lengths]
    parts = list(split_by_tokens(rollouts, tokens))
    found = [[rollout.length for rollout in part] for part in parts]
    assert [length for part in found for length in part] == sorted(lengths)
    assert all(part and (sum(part) <= tokens or len(part) == 1) for part in found)
    for part, following in itertools.pairwise(found):
        assert sum(part) + following[0] > tokens


@given(st.lists(st.integers(0, 9), max_size=200), st.none() | st.integers(0, 9))
def test_padding_is_one_row_at_least(rows: list[int], fill: int | None) -> None:
    padded = pad_rows(torch.tensor(rows, dtype=torch.int64), fill).tolist()
    assert padded[: len(rows)] == rows
    expected = [*rows, 0][0] if fill is None else fill
    assert set(padded[len(rows) :]) == {expected}
    assert 1 <= len(padded) - len(rows) <= ROW_MULTIPLE
    assert len(padded) % ROW_MULTIPLE == 0
