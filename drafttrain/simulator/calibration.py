"""Calibration: the published figures, the constants fitted to some of them, and how near all come.

Six constants are fitted to eight figures (``fitted: true`` in ``published.yaml``) and one to a
ninth; everything else is predicted. The six are three costs of the engine's software (one drafting
pass, a layer outside the captured graphs, a token of n-gram search) and the lengths of two
workloads' responses (two medians, one spread), which the paper does not give. The seventh is the
training work of the 235B projection, from its two speedups. ``python -m
drafttrain.simulator.calibration`` fits them again and prints ``calibration.yaml``'s numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Literal

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import Field
from scipy.optimize import least_squares

from drafttrain.config import Section
from drafttrain.simulator.acceptance import Acceptance
from drafttrain.simulator.models import DrafterKind
from drafttrain.simulator.pipeline import Comparison, compare
from drafttrain.simulator.scenario import DATA, Scenario, changed, load_preset

Quantity = Literal["generation_speedup", "step_seconds", "step_speedup"]


class Figure(Section):
    """A published figure, and what it is the answer to."""

    name: str
    published: float
    preset: str
    quantity: Quantity
    k: int = Field(ge=0)
    kind: DrafterKind = "eagle3"
    lengths: dict[int, float] | None = None
    fitted: bool
    required: bool = True
    source: str


@dataclass(frozen=True)
class Prediction:
    """A figure beside ours."""

    figure: Figure
    predicted: float

    @property
    def error(self) -> float:
        """Relative, signed."""
        return self.predicted / self.figure.published - 1.0


@dataclass(frozen=True)
class Constants:
    """What is fitted."""

    draft: float
    uncaptured_layer: float
    lookup: float
    rl_zero_median: float
    rl_think_median: float
    spread: float

    def apply(self, scenario: Scenario) -> Scenario:
        """A measured run's scenario with these constants."""
        engine = changed(
            scenario.engine,
            draft=self.draft,
            uncaptured_layer=self.uncaptured_layer,
            lookup=self.lookup,
        )
        zero = "RL-Zero" in scenario.title
        median = self.rl_zero_median if zero else self.rl_think_median
        lengths = changed(scenario.workload.responses, median=median, spread=self.spread)
        return changed(
            scenario, engine=engine, workload=changed(scenario.workload, responses=lengths)
        )


# Where the fit starts: far from its result, so that a refit is no echo of the file.
START = Constants(
    draft=1e-3,
    uncaptured_layer=3e-4,
    lookup=3e-8,
    rl_zero_median=4000.0,
    rl_think_median=8000.0,
    spread=1.0,
)


@cache
def figures() -> list[Figure]:
    """Every published figure, in the order of ``published.yaml``."""
    document = yaml.safe_load((DATA / "published.yaml").read_text())
    return [Figure.model_validate(entry) for entry in document["figures"]]


def scenario_of(figure: Figure) -> Scenario:
    """The preset with the figure's own drafter."""
    scenario = load_preset(figure.preset)
    drafter = changed(scenario.drafter, kind=figure.kind)
    if figure.lengths is not None:
        drafter = changed(drafter, acceptance=Acceptance(lengths=figure.lengths))
    return changed(scenario, drafter=drafter)


def predict(
    wanted: list[Figure], adjust: Callable[[Scenario], Scenario] = lambda scenario: scenario
) -> list[Prediction]:
    """Answer figures; `adjust` changes each scenario first."""
    known: dict[str, Comparison] = {}
    predictions = []
    for figure in wanted:
        comparison = compare(adjust(scenario_of(figure)), figure.k, known=known.get(figure.preset))
        known[figure.preset] = comparison
        predictions.append(Prediction(figure, _answer(figure, comparison)))
    return predictions


def _answer(figure: Figure, comparison: Comparison) -> float:
    if figure.quantity == "generation_speedup":
        return comparison.generation_speedup
    if figure.quantity == "step_speedup":
        return comparison.step_speedup
    return comparison.speculation.seconds


def fit(published: list[Figure]) -> Constants:
    """Fit the six constants to the fitted figures of the measured runs; takes some 10 seconds."""
    wanted = [figure for figure in published if figure.fitted and figure.preset.startswith("8b-")]
    names = list(vars(START))
    start = np.log([vars(START)[name] for name in names])

    def errors(logs: NDArray[np.float64]) -> NDArray[np.float64]:
        constants = Constants(**dict(zip(names, np.exp(logs).tolist(), strict=True)))
        predictions = predict(wanted, constants.apply)
        return np.log([p.predicted / p.figure.published for p in predictions])

    fitted = least_squares(errors, start, diff_step=1e-3, x_scale=0.1)
    return Constants(**dict(zip(names, np.exp(fitted.x).tolist(), strict=True)))


def fit_training(published: list[Figure]) -> float:
    """GPU-seconds of training in the 235B projection, from its end-to-end speedup."""
    [figure] = [f for f in published if f.fitted and not f.preset.startswith("8b-")]
    scenario = scenario_of(figure)
    comparison = compare(scenario, figure.k)
    wanted = figure.published
    before, after = comparison.baseline.generation, comparison.speculation.generation
    # wanted = (before + rest) / (after + rest)
    return (before - wanted * after) / (wanted - 1.0) * scenario.cluster.gpus


def median_error(predictions: list[Prediction]) -> float:
    """Median size of the error over the figures that the simulator promises to meet."""
    sizes = [abs(p.error) for p in predictions if p.figure.required]
    return float(np.median(sizes))


if __name__ == "__main__":
    for name, value in vars(fit(figures())).items():
        print(f"{name}: {value:.4g}")
    print(f"qwen3-235b training GPU-seconds: {fit_training(figures()):.4g}")
