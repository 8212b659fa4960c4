"""Plots of a study, as PNG files."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from drafttrain.errors import InputError
from drafttrain.simulator.calibration import Prediction
from drafttrain.simulator.study import GRID_ACCEPTANCE, GRID_K, Study


def plot_study(study: Study, folder: Path) -> Path:
    """Write ``simulation.png``; returns its path.

    Raises:
        InputError: the folder cannot be written.
    """
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), constrained_layout=True)
    figure.suptitle(study.scenario.title)
    _plot_stages(axes[0, 0], study)
    _plot_by_k(axes[0, 1], study)
    _plot_grid(axes[1, 0], study)
    _plot_online(axes[1, 1], study)
    return _save(folder / "simulation.png")


def plot_calibration(predictions: list[Prediction], folder: Path) -> Path:
    """Write ``calibration.png``; returns its path.

    Raises:
        InputError: the folder cannot be written.
    """
    _, axes = plt.subplots(figsize=(6, 6), constrained_layout=True)
    speedups = [p for p in predictions if p.figure.quantity != "step_seconds"]
    for fitted, marker, label in ((True, "s", "fitted"), (False, "o", "held out")):
        chosen = [p for p in speedups if p.figure.fitted == fitted]
        published = [p.figure.published for p in chosen]
        axes.plot(published, [p.predicted for p in chosen], marker, label=label, alpha=0.7)
    ends = [0.4, 4.5]
    axes.loglog(ends, ends, color="grey", linewidth=1)
    axes.fill_between(ends, [e * 0.9 for e in ends], [e * 1.1 for e in ends], alpha=0.15)
    axes.set(xlabel="published speedup", ylabel="simulated speedup (band: ±10%)")
    axes.legend()
    return _save(folder / "calibration.png")


def _save(path: Path) -> Path:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        plt.savefig(path, dpi=110)
    except OSError as error:
        raise InputError(path, "--out", f"cannot be written: {error.strerror}") from error
    finally:
        plt.close()
    return path


def _plot_stages(axes: Axes, study: Study) -> None:
    bottoms = [0.0, 0.0]
    runs = (study.comparison.baseline, study.comparison.speculation)
    for name in ("exposed", *runs[0].stages):
        heights = [run.exposed if name == "exposed" else run.stages[name] for run in runs]
        label = "generation" if name == "exposed" else name
        axes.bar(["no speculation", "speculation"], heights, bottom=bottoms, label=label)
        bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
    axes.set(ylabel="seconds", title="an RL step (generation: what the trainer waits for)")
    axes.legend()


def _plot_by_k(axes: Axes, study: Study) -> None:
    ks = list(study.by_k)
    axes.plot(ks, [study.by_k[k].generation_speedup for k in ks], "o-", label="rollouts")
    axes.plot(ks, [study.by_k[k].step_speedup for k in ks], "s-", label="RL step")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlabel="k, draft tokens", ylabel="speedup", title="with the scenario's acceptance")
    axes.legend()


def _plot_grid(axes: Axes, study: Study) -> None:
    cells = {(cell.acceptance, cell.k): cell.step_speedup for cell in study.grid}
    rows = [[cells[chance, k] for k in GRID_K] for chance in GRID_ACCEPTANCE]
    image = axes.imshow(rows, origin="lower", aspect="auto", cmap="viridis")
    for y, row in enumerate(rows):
        for x, value in enumerate(row):
            axes.text(x, y, f"{value:.2f}", ha="center", va="center", color="white")
    axes.set_xticks(range(len(GRID_K)), [str(k) for k in GRID_K])
    axes.set_yticks(range(len(GRID_ACCEPTANCE)), [str(chance) for chance in GRID_ACCEPTANCE])
    axes.set(xlabel="k", ylabel="acceptance of each draft", title="end-to-end speedup")
    axes.figure.colorbar(image, ax=axes)


def _plot_online(axes: Axes, study: Study) -> None:
    online = study.online
    axes.plot(online.trained, label="drafter trained online")
    axes.plot(online.frozen, label="drafter frozen")
    axes.axhline(1.0, color="grey", linewidth=1)
    axes.set(xlabel="RL step", ylabel="end-to-end speedup", title="while the policy moves")
    axes.legend()
