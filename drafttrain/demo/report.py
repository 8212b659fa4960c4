"""What the demo shows: a table a person can scan, a plot, and ``summary.json``."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from rich.console import Console
from rich.table import Table

from drafttrain.errors import InputError

ARM_COLOURS = {"none": "0.45", "frozen": "tab:orange", "sidecar": "tab:blue"}


def read_summary(run: Path) -> dict[str, Any]:
    """``summary.json`` of a run.

    Raises:
        InputError: it is missing or damaged.
    """
    path = run / "summary.json"
    try:
        summary: dict[str, Any] = json.loads(path.read_text())
    except OSError as error:
        raise InputError(path, "file", f"cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise InputError(path, "file", f"is not JSON: {error}") from error
    if not summary.get("steps") or "totals" not in summary:
        raise InputError(path, "steps", "missing; expected a summary written by the demo")
    return summary


def write_report(run: Path, summary: dict[str, Any]) -> None:
    """Write ``summary.json`` and ``plot.png`` into the run's folder."""
    (run / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
    plot(summary, run / "plot.png")


def print_report(run: Path) -> None:
    """Print a finished run's tables and draw its plot again."""
    summary = read_summary(run)
    console = Console()
    console.print(steps_table(summary["steps"]))
    console.print(totals_table(summary))
    plot(summary, run / "plot.png")
    console.print(f"plot: {run / 'plot.png'}")


def steps_table(steps: list[dict[str, Any]]) -> Table:
    """One row for each RL step."""
    table = Table(title="rollouts of each RL step: tokens/s, and acceptance length")
    for name in ("step", "reward", "drafter"):
        table.add_column(name, justify="right")
    for name in ("none", "frozen", "sidecar"):
        table.add_column(f"{name}\ntok/s", justify="right")
    for name in ("frozen", "sidecar"):
        table.add_column(f"{name}\nlength", justify="right")
    for step in steps:
        arms = step["arms"]
        table.add_row(
            str(step["step"]),
            f"{step['reward']:.2f}",
            f"v{step['drafter_version']}",
            *(f"{arms[name]['tokens_per_s']:.0f}" for name in ("none", "frozen", "sidecar")),
            *(f"{arms[name]['acceptance_length']:.2f}" for name in ("frozen", "sidecar")),
        )
    return table


def last_third(summary: dict[str, Any]) -> dict[str, float]:
    """Median rollout speedups over the last third of the run, ratios within each RL step."""
    steps = summary["steps"]
    tail = steps[-max(1, len(steps) // 3) :]

    def ratio(arm: str, other: str) -> float:
        speeds = [(step["arms"][arm], step["arms"][other]) for step in tail]
        return float(median(a["tokens_per_s"] / b["tokens_per_s"] for a, b in speeds))

    return {
        "sidecar_over_none": ratio("sidecar", "none"),
        "sidecar_over_frozen": ratio("sidecar", "frozen"),
        "frozen_over_none": ratio("frozen", "none"),
    }


def totals_table(summary: dict[str, Any]) -> Table:
    """What the run comes to."""
    totals, last = summary["totals"], summary["steps"][-1]["arms"]
    speed = last_third(summary)
    drift = totals["policy_drift"]
    rows = {
        "rollout speed, last third, against no speculation": (
            f"sidecar {speed['sidecar_over_none']:.2f}x, frozen {speed['frozen_over_none']:.2f}x, "
            f"n-gram {totals['ngram']['tokens_per_s'] / last['none']['tokens_per_s']:.2f}x"
        ),
        "acceptance length at the end": (
            f"sidecar {last['sidecar']['acceptance_length']:.2f}, "
            f"frozen {last['frozen']['acceptance_length']:.2f}, "
            f"trained on {totals['converged_acceptance_length']:.2f}"
        ),
        "policy drift": (
            f"KL to the start {drift['kl_to_start']:.2f} nats a token, "
            f"entropy {drift['entropy_first']:.2f} to {drift['entropy_last']:.2f}"
        ),
        "swaps": (
            f"{totals['swaps']}, median {1000 * median(totals['swap_seconds'] or [0]):.0f} ms, "
            f"{totals['aborted_requests']} requests aborted"
        ),
        "cost of the tap": f"{100 * totals['tap_overhead']:.1f}% of rollout time",
        "greedy outputs with and without speculation": (
            "identical" if totals["greedy_identical"] else "DIFFERENT"
        ),
        "sampled outputs, two-sample test": f"p = {totals['sampled_p_value']:.2f}",
    }
    table = Table(title="in all", show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def plot(summary: dict[str, Any], path: Path) -> None:
    """Acceptance length and rollout speed over RL steps; a dotted line where a swap happened."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    steps = summary["steps"]
    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(8, 6.5), sharex=True)
    for arm, colour in ARM_COLOURS.items():
        numbers = [step["step"] for step in steps]
        speeds = [step["arms"][arm]["tokens_per_s"] for step in steps]
        bottom.plot(numbers, speeds, "o-", color=colour, label=_label(arm))
        if arm != "none":
            lengths = [step["arms"][arm]["acceptance_length"] for step in steps]
            top.plot(numbers, lengths, "o-", color=colour, label=_label(arm))
    converged = summary["totals"]["converged_acceptance_length"]
    label = "trained on, on the final policy's rollouts alone"
    top.axhline(converged, color="tab:green", linestyle="--", linewidth=1, label=label)
    for axis in (top, bottom):
        for step in summary["totals"]["swap_steps"]:
            axis.axvline(step, color="tab:blue", linestyle=":", linewidth=0.8, alpha=0.6)
        axis.grid(alpha=0.25)
        axis.legend(loc="lower left", fontsize=8)
    top.set_ylabel("acceptance length")
    bottom.set_ylabel("rollout tokens/s")
    bottom.set_ylim(bottom=0)
    bottom.set_xlabel("RL step   (dotted: a new drafter was swapped in)")
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _label(arm: str) -> str:
    return {
        "none": "no speculation",
        "frozen": "drafter frozen at step 0",
        "sidecar": "drafter kept by the sidecar",
    }[arm]


def step_at(moment: float, steps: list[dict[str, Any]]) -> float:
    """The RL step, with its fraction, that a moment in time fell into."""
    starts: list[float] = [step["time"] for step in steps]
    for index, start in enumerate(starts):
        end = starts[index + 1] if index + 1 < len(starts) else float("inf")
        if start <= moment < end:
            return index + min((moment - start) / (end - start), 1.0)
    return 0.0
