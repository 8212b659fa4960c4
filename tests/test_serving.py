"""Engines are brought to one version together, whatever state each of them is in."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest

from drafttrain.errors import EngineError, EngineUnreachable
from drafttrain.serving import bring_to, newest_serving


@dataclass(frozen=True)
class Result:
    previous: int | None
    seconds: float = 0.01


@dataclass
class FakeEngine:
    """Serves a version, or fails with ``problem``."""

    url: str
    serving: int | None = 1
    problem: EngineError | None = None
    swaps: list[int] = field(default_factory=list)
    together: threading.Barrier | None = None

    def drafter_version(self) -> int | None:
        if isinstance(self.problem, EngineUnreachable):
            raise self.problem
        return self.serving

    def swap(self, version: int) -> Result:
        if self.problem is not None:
            raise self.problem
        if self.together is not None:
            self.together.wait(5)
        previous, self.serving = self.serving, version
        self.swaps.append(version)
        return Result(previous)


def test_engines_are_swapped_at_the_same_time() -> None:
    together = threading.Barrier(3)  # none of the swaps ends before all have begun
    engines = [FakeEngine(f"e{i}", together=together) for i in range(3)]
    brought = bring_to(engines, 2)
    assert [(b.url, b.previous, b.error) for b in brought] == [(f"e{i}", 1, None) for i in range(3)]
    assert [engine.serving for engine in engines] == [2, 2, 2]


def test_an_engine_that_serves_it_already_is_left_alone() -> None:
    engines = [FakeEngine("a", serving=2), FakeEngine("b", serving=None)]
    first, second = bring_to(engines, 2)
    assert (first.seconds, first.error, engines[0].swaps) == (None, None, [])
    assert (second.previous, engines[1].swaps) == (None, [2])


@pytest.mark.parametrize("problem", [EngineError("no"), EngineUnreachable("gone")])
def test_one_engine_s_failure_is_its_own(problem: EngineError) -> None:
    engines = [FakeEngine("a", problem=problem), FakeEngine("b")]
    first, second = bring_to(engines, 2)
    assert first.error is problem
    assert second.error is None
    assert engines[1].serving == 2


def test_what_a_dead_engine_missed_is_done_when_it_is_back() -> None:
    dead, alive = FakeEngine("a", problem=EngineUnreachable("gone")), FakeEngine("b")
    bring_to([dead, alive], 2)
    dead.problem = None
    assert [b.error for b in bring_to([dead, alive], 2)] == [None, None]
    assert (dead.swaps, alive.swaps) == ([2], [2])


def test_the_canary_goes_first_and_spares_the_others() -> None:
    engines = [FakeEngine("canary", problem=EngineError("does not fit")), FakeEngine("b")]
    first, second = bring_to(engines, 2, canary=True)
    assert str(first.error) == "does not fit"
    assert "the canary canary does not serve 2" in str(second.error)
    assert engines[1].swaps == []
    engines[0].problem = None
    assert [b.error for b in bring_to(engines, 2, canary=True)] == [None, None]
    assert bring_to([], 2, canary=True) == []


def test_a_rollback_starts_from_the_newest_that_answers() -> None:
    gone = FakeEngine("a", problem=EngineUnreachable("gone"))
    assert newest_serving([FakeEngine("b", 3), gone, FakeEngine("c", 5)]) == 5
    assert newest_serving([FakeEngine("b", None)]) is None
    with pytest.raises(EngineUnreachable):
        newest_serving([gone])
