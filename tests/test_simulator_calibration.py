"""The simulator against published figures, and the proof that it could be wrong."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from drafttrain.simulator.calibration import (
    Figure,
    Prediction,
    figures,
    fit,
    fit_training,
    median_error,
    predict,
    scenario_of,
)
from drafttrain.simulator.pipeline import compare
from drafttrain.simulator.scenario import Scenario, calibration, changed


@pytest.fixture(scope="module")
def predictions() -> list[Prediction]:
    return predict(figures())


def required(predictions: list[Prediction]) -> list[Prediction]:
    return [p for p in predictions if p.figure.required]


def test_the_promised_figures_are_there_and_half_are_held_out() -> None:
    promised = [figure for figure in figures() if figure.required]
    assert len(promised) == 17
    assert sum(not figure.fitted for figure in promised) == 8
    assert sum(figure.quantity == "generation_speedup" for figure in promised) == 10


def test_every_promised_figure_is_near(predictions: list[Prediction]) -> None:
    far = [p.figure.name for p in required(predictions) if abs(p.error) > 0.085]
    assert not far
    assert median_error(predictions) < 0.01


def test_held_out_figures_are_near(predictions: list[Prediction]) -> None:
    held_out = [p for p in required(predictions) if not p.figure.fitted]
    assert median_error(held_out) < 0.035


def test_what_is_not_explained_is_where_the_documentation_says(
    predictions: list[Prediction],
) -> None:
    far = {p.figure.name for p in predictions if abs(p.error) > 0.10}
    assert far == {
        "RL-Think UltraChat drafter k=3",
        "RL-Think UltraChat drafter online k=3",
    }


def test_the_shipped_constants_are_fitted_without_held_out_figures() -> None:
    # Held-out figures are made absurd: a fit that looked at one would go astray.
    absurd = [
        figure if figure.fitted else changed(figure, published=1000.0) for figure in figures()
    ]
    fitted = asdict(fit(absurd))
    engine, responses = calibration()["engines"]["vllm"], calibration()["responses"]
    shipped = {
        "draft": engine["draft"],
        "uncaptured_layer": engine["uncaptured_layer"],
        "lookup": engine["lookup"],
        "rl_zero_median": responses["rl-zero"]["median"],
        "rl_think_median": responses["rl-think"]["median"],
        "spread": responses["rl-think"]["spread"],
    }
    assert fitted == pytest.approx(shipped, rel=0.02)
    assert fit_training(absurd) == pytest.approx(calibration()["training"]["qwen3-235b"], rel=0.01)


def by_name(name: str) -> Figure:
    [figure] = [figure for figure in figures() if figure.name == name]
    return figure


def speedup(figure: Figure, scenario: Scenario) -> float:
    return compare(scenario, figure.k).generation_speedup


def test_the_fall_with_k_comes_from_the_graphs_edge() -> None:
    # The same engine without that edge: k = 5 on RL-Think would have gained.
    figure = by_name("RL-Think generation speedup k=5")
    scenario = scenario_of(figure)
    unlimited = changed(scenario, engine=changed(scenario.engine, captured_tokens=None))
    assert speedup(figure, scenario) < 0.9
    assert speedup(figure, unlimited) > 1.3


def test_faster_drafting_helps_long_drafts_most() -> None:
    gains = []
    for k in (3, 7):
        figure = by_name(f"RL-Zero generation speedup k={k}")
        scenario = scenario_of(figure)
        free = changed(scenario, engine=changed(scenario.engine, draft=0.0))
        gains.append(speedup(figure, free) / speedup(figure, scenario))
    assert 1.0 < gains[0] < gains[1]


def test_ngrams_would_gain_if_the_search_were_free() -> None:
    figure = by_name("RL-Zero generation speedup n-gram")
    scenario = scenario_of(figure)
    free = changed(scenario, engine=changed(scenario.engine, lookup=0.0))
    assert speedup(figure, scenario) < 1.0 < speedup(figure, free)


def test_the_projection_needs_an_engine_without_software() -> None:
    figure = by_name("235B on 512 GPUs rollout speedup k=3, length 3")
    scenario = scenario_of(figure)
    measured = scenario_of(by_name("RL-Zero generation speedup k=3")).engine
    assert speedup(figure, changed(scenario, engine=measured)) < 0.85 * figure.published
