"""Layer one of the simulator: what a step costs, its directions and its limits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from drafttrain.simulator.acceptance import Acceptance, Drift
from drafttrain.simulator.hardware import DEVICES, Engine
from drafttrain.simulator.models import MODELS, drafter_shape, read_shape
from drafttrain.simulator.roofline import AtContext, Roofline

DENSE, MOE = MODELS["qwen3-8b"], MODELS["qwen3-235b-a22b"]
SOFTWARE = Engine(
    host=3e-3,
    draft=2e-3,
    captured_tokens=512,
    uncaptured_layer=1e-3,
    lookup=1e-7,
    sampling_passes=6,
)
INSTANT = DEVICES["gb200"].model_copy(
    update={
        "bandwidth": 1e30,
        "flops": {"bf16": 1e30, "fp8": 1e30},
        "link_bandwidth": 1e30,
        "link_latency": 0.0,
    }
)


def roofline(model: Any = DENSE, kind: Any = "eagle3", **changes: Any) -> Roofline:
    given_ = {
        "policy": model,
        "device": DEVICES["gb200"],
        "engine": SOFTWARE,
        "precision": "bf16",
        "drafter": drafter_shape(kind, model, 32000, None),
        **changes,
    }
    return Roofline(**given_)


shapes = st.tuples(st.integers(1, 400), st.integers(1, 16000), st.integers(0, 10))
policies = st.sampled_from([roofline(), roofline(MOE, precision="fp8", devices=8)])


def test_weights_are_those_of_the_model() -> None:
    # Qwen3-8B has 8.2e9 parameters, 0.6e9 of them the embedding; 235B-A22B says so itself.
    assert DENSE.active_weights == pytest.approx(7.6e9, rel=0.01)
    assert MOE.active_weights == pytest.approx(21.6e9, rel=0.02)
    assert MOE.shared_weights + MOE.expert_weights == pytest.approx(234.5e9, rel=0.01)
    assert DENSE.kv_width * 2 == 147456


def test_a_single_request_waits_for_the_weights() -> None:
    ideal = roofline(engine=Engine())
    seconds = ideal.seconds(1, 1, 0)
    assert seconds == pytest.approx(DENSE.shared_weights * 2 / (8e12 * 0.75), rel=0.01)


@given(policies, shapes, shapes)
def test_more_of_anything_is_not_faster(
    step: Roofline, one: tuple[int, int, int], other: tuple[int, int, int]
) -> None:
    low = [min(pair) for pair in zip(one, other, strict=True)]
    high = [max(pair) for pair in zip(one, other, strict=True)]
    before, after = step.parts(*low), step.parts(*high)
    assert all(after[name] >= before[name] >= 0 for name in before)


@given(policies, st.lists(shapes, min_size=1, max_size=5))
def test_arrays_are_the_same_as_one_at_a_time(
    step: Roofline, many: list[tuple[int, int, int]]
) -> None:
    batch, context, k = (np.array(column) for column in zip(*many, strict=True))
    together = step.seconds(batch, context, k)
    assert together == pytest.approx([float(step.seconds(*shape)) for shape in many])


def test_without_drafts_nothing_is_drafted() -> None:
    for kind in ("eagle3", "mtp", "ngram"):
        assert roofline(kind=kind).parts(64, 4000, 0)["drafting"] == 0.0


def test_an_infinitely_fast_device_leaves_the_software() -> None:
    parts = roofline(device=INSTANT).parts(64, 4000, 3)
    assert sum(parts.values()) == pytest.approx(SOFTWARE.host + 3 * SOFTWARE.draft)


def test_perfect_free_drafts_multiply_a_memory_bound_engine() -> None:
    # No software, arithmetic free, a drafter of nothing: k + 1 tokens for the price of one.
    fast = DEVICES["gb200"].model_copy(update={"flops": {"bf16": 1e30}})
    cost = AtContext(roofline(engine=Engine(), device=fast, drafter=None), context=4000)
    for k in (1, 3, 7):
        assert cost.speedup(8, k, [1.0] * k) == pytest.approx(k + 1)


def test_a_compute_bound_engine_gains_nothing() -> None:
    wide = DEVICES["gb200"].model_copy(update={"bandwidth": 1e30})
    cost = AtContext(roofline(engine=Engine(), device=wide, drafter=None), context=4000)
    assert cost.speedup(256, 3, [1.0] * 3) == pytest.approx(1.0)
    assert cost.speedup(256, 3, [0.8, 0.6, 0.4]) < 1.0


@pytest.mark.parametrize("tokens", [1, 4, 16, 64, 300])
def test_experts_touched_are_those_of_random_routing(tokens: int) -> None:
    rng = np.random.default_rng(0)
    touched = [
        len(np.unique([rng.choice(128, 8, replace=False) for _ in range(tokens)])) for _ in range(5)
    ]
    step = roofline(MOE, engine=Engine())
    seconds = step.parts(tokens, 0, 0)["weights"] * (8e12 * 0.75)
    share = (seconds / 2 - MOE.shared_weights) / MOE.expert_weights
    assert share == pytest.approx(np.mean(touched) / 128, abs=0.03)


def test_a_small_batch_of_an_moe_pays_for_its_drafts_in_experts() -> None:
    ideal = roofline(MOE, engine=Engine(), drafter=None, precision="fp8", devices=8)
    accepted = [0.8, 0.64, 0.51]
    few, many = (AtContext(ideal, 1000).speedup(batch, 3, accepted) for batch in (4, 128))
    assert few < many
    dense = roofline(engine=Engine(), drafter=None)
    few, many = (AtContext(dense, 1000).speedup(batch, 3, accepted) for batch in (4, 128))
    assert few > many


def test_beyond_the_captured_graphs_a_step_is_slow() -> None:
    step = roofline()
    inside, outside = step.parts(128, 4000, 3), step.parts(129, 4000, 3)
    assert inside["outside graphs"] == 0.0
    assert outside["outside graphs"] == pytest.approx(36e-3)


def test_ngrams_cost_what_they_search() -> None:
    step = roofline(kind="ngram")
    assert step.parts(64, 4000, 3)["drafting"] == pytest.approx(64 * 4000 * 1e-7)
    assert step.parts(64, 4000, 7)["drafting"] == step.parts(64, 4000, 3)["drafting"]


def test_devices_of_a_replica_share_the_work_and_talk() -> None:
    one, eight = roofline(MOE, precision="fp8"), roofline(MOE, precision="fp8", devices=8)
    alone, shared = one.parts(64, 4000, 0), eight.parts(64, 4000, 0)
    assert shared["weights"] == pytest.approx(alone["weights"] / 8)
    assert alone["communication"] == 0.0
    assert shared["communication"] > 2 * 94 * 8e-6
    # Four KV heads cannot be divided among eight devices.
    assert shared["kv cache"] == pytest.approx(alone["kv cache"] / 4)


def test_a_policy_is_read_from_its_folder(tmp_path: Path) -> None:
    config = {
        "hidden_size": 4096,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "intermediate_size": 12288,
        "vocab_size": 151936,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_shape(tmp_path) == DENSE
    moe = {
        **config,
        "num_hidden_layers": 94,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
    }
    (tmp_path / "config.json").write_text(json.dumps(moe))
    assert read_shape(tmp_path) == MOE


@pytest.mark.parametrize("content", ["", "[]", '{"hidden_size": 1}'])
def test_a_bad_folder_is_refused(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        read_shape(tmp_path)


@pytest.mark.parametrize("heads", [None, 0, "x", True])
def test_a_size_that_is_none_is_named(tmp_path: Path, heads: object) -> None:
    config = {"num_hidden_layers": 1, "hidden_size": 8, "vocab_size": 9}
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_attention_heads": heads}))
    with pytest.raises(ValueError, match=r"config\.json: num_attention_heads: expected"):
        read_shape(tmp_path)


@given(st.floats(0.05, 1.0), st.floats(0.8, 1.0))
def test_acceptance_comes_back_from_its_lengths(first: float, decay: float) -> None:
    survive = np.cumprod(first * decay ** np.arange(7))
    lengths = {k: float(1 + survive[:k].sum()) for k in (3, 5, 7)}
    found = Acceptance(lengths=lengths).per_position_at(7)
    assert found == pytest.approx(survive, abs=2e-3)


@given(st.integers(1, 10), st.floats(0, 1))
def test_one_length_is_met_exactly(k: int, part: float) -> None:
    length = 1 + k * part
    survive = Acceptance(lengths={k: length}).per_position_at(k)
    assert 1 + survive.sum() == pytest.approx(length, abs=1e-6)


def test_measured_positions_are_kept_and_continued() -> None:
    survive = Acceptance(per_position=(0.8, 0.6, 0.48)).per_position_at(5)
    assert survive == pytest.approx([0.8, 0.6, 0.48, 0.48 * 0.8, 0.48 * 0.64])
    assert Acceptance(per_position=(0.5, 0.0)).per_position_at(3) == pytest.approx([0.5, 0, 0])


def test_acceptance_drifts_and_recovers() -> None:
    drift = Drift(initial_loss=0.2, per_version=0.01, recovery=0.5)
    frozen, trained = drift.losses(100, trained=False), drift.losses(100, trained=True)
    assert frozen[0] == trained[0] == 0.2
    assert np.all(np.diff(frozen) > 0)
    # What is lost in a version equals what training wins back.
    steady = trained[-1]
    assert 1 - (1 - steady * 0.5) * 0.99 == pytest.approx(steady)
    assert Drift(initial_loss=0.2).losses(3, trained=False) == pytest.approx([0.2] * 3)
