"""Every kind of drafter in a real engine: what is trained is what drafts.

The whole of it, over more tokens, is ``python -m benchmarks.parity``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks.engines import Engine
from benchmarks.parity import Bench, DraftParity, in_own_process
from benchmarks.subjects import subject_named
from drafttrain.drafters import Eagle3Drafter, MTPDrafter

# One of each kind, on the policy that shows most.
chosen = pytest.mark.parametrize(
    "name", ["eagle3, draft vocabulary", "mtp of MiMo", "draft model of Qwen3"]
)


@pytest.fixture(scope="module")
def bench_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bench]:
    @cache
    def bench(name: str) -> Bench:
        with torch.enable_grad():
            return Bench(subject_named(name), tmp_path_factory.mktemp("kinds"), steps=40)

    return bench


def assert_alike(parity: DraftParity, positions: int) -> None:
    """Of more than so many drafted positions, at least 99.9% alike."""
    assert parity.positions > positions
    assert parity.agreeing + parity.ties >= 0.999 * parity.positions, parity


@chosen
@pytest.mark.parametrize("k", [1, 4])
def test_the_engine_drafts_what_our_forward_drafts(
    bench_of: Callable[[str], Bench], name: str, k: int
) -> None:
    assert_alike(bench_of(name).parity(k, count=24), 300 * k)


@pytest.mark.parametrize(
    "name",
    [
        "mtp of GLM-4 MoE",
        "mtp of Qwen3-Next",
        "mtp of Qwen3.5-MoE with a vision tower",
        "mtp of DeepSeek-V3",
        "draft model of Qwen3-MoE",
    ],
)
def test_drafters_with_experts_draft_so_wherever_they_come_from(name: str, tmp_path: Path) -> None:
    """A folder, a swap, and for a head the policy that it is stitched into."""
    for parity in in_own_process(parity_by_origin, name, tmp_path):
        assert_alike(parity, 300)


def parity_by_origin(name: str, folder: Path) -> list[DraftParity]:
    bench = Bench(subject_named(name), folder, steps=40)
    engines = [bench.engine(3), bench.swapped(3)]
    if isinstance(bench.drafter, MTPDrafter):
        policy = folder / "stitched"
        bench.drafter.stitch(bench.policy, policy)
        overrides, spool = bench.subject.overrides, folder / "spool"
        engines.append(Engine(policy, policy, method="mtp", k=3, spool=spool, overrides=overrides))
    return [bench.parity(3, 16, engine) for engine in engines]


@chosen
def test_the_estimate_is_what_the_engine_counts(
    bench_of: Callable[[str], Bench], name: str
) -> None:
    bench = bench_of(name)
    engine = bench.engine(3, "probabilistic")
    found = bench.acceptance(engine, "probabilistic", 1.0, drafted=6_000)
    assert found.counted > 1.2, "a drafter that accepts nothing shows nothing"
    # Over so few tokens the counters themselves are good to about two percent.
    assert found.ratio == pytest.approx(1.0, abs=0.04)


def test_a_policy_with_a_new_head_stitched_in_drafts_by_itself(
    bench_of: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = bench_of("mtp of MiMo")
    assert isinstance(bench.drafter, MTPDrafter)
    policy = tmp_path / "stitched"
    bench.drafter.stitch(bench.policy, policy)
    engine = Engine(policy, policy, method="mtp", k=2, spool=tmp_path / "spool")
    assert_alike(bench.parity(2, 16, engine), 200)


def test_the_engine_reads_the_layout_of_speculators(
    bench_of: Callable[[str], Bench], tmp_path: Path
) -> None:
    bench = bench_of("eagle3, draft vocabulary")
    assert isinstance(bench.drafter, Eagle3Drafter)
    folder = tmp_path / "eagle3"
    bench.drafter.export_speculators(folder, bench.policy, k=2)
    engine = Engine(bench.policy, folder, method="eagle3", k=2, spool=tmp_path / "spool")
    assert_alike(bench.parity(2, 16, engine), 200)
