"""Tables for people and JSON for machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.console import Console
from rich.table import Table

from drafttrain.simulator.calibration import Prediction, median_error
from drafttrain.simulator.pipeline import Comparison, RunningStep, mean_context, slots, step_model
from drafttrain.simulator.roofline import Roofline
from drafttrain.simulator.scenario import Scenario
from drafttrain.simulator.study import BETTER, GRID_ACCEPTANCE, GRID_K, Study


def as_json(study: Study) -> dict[str, Any]:
    """The study as plain data."""
    comparison = study.comparison
    return {
        "title": study.scenario.title,
        "k": study.scenario.drafter.k,
        "generation_speedup": comparison.generation_speedup,
        "step_speedup": comparison.step_speedup,
        "bound": _bound(study),
        "baseline": asdict(comparison.baseline),
        "speculation": asdict(comparison.speculation),
        "by_k": {str(k): _speedups(entry) for k, entry in study.by_k.items()},
        "adaptive": _speedups(study.adaptive),
        "grid": [asdict(cell) for cell in study.grid],
        "sensitivity": [asdict(entry) for entry in study.sensitivity],
        "best_k": [list(entry) for entry in study.best_k],
        "break_even_acceptance": study.break_even_acceptance,
        "break_even_batch": study.pays[0][1] if study.pays else 0,
        "pays": [list(entry) for entry in study.pays],
        "batch": study.batch,
        "fits": study.fits,
        "kinds": [asdict(kind) for kind in study.kinds],
        "online": asdict(study.online),
        "assumptions": list(assumptions(study.scenario)),
    }


def calibration_json(predictions: list[Prediction]) -> dict[str, Any]:
    """Every published figure beside ours."""
    return {
        "figures": [
            {
                "name": p.figure.name,
                "published": p.figure.published,
                "predicted": p.predicted,
                "error": p.error,
                "held_out": not p.figure.fitted,
                "required": p.figure.required,
                "source": p.figure.source,
            }
            for p in predictions
        ],
        "median_error": median_error(predictions),
    }


def print_study(study: Study) -> None:
    """What a person reads."""
    console = Console()
    k, comparison = study.scenario.drafter.k, study.comparison
    console.print(f"[bold]{study.scenario.title or 'RL job'}[/bold]")
    console.print(
        f"{study.scenario.drafter.kind} with k = {k}: rollouts [bold]"
        f"{comparison.generation_speedup:.2f}x[/bold], RL step [bold]"
        f"{comparison.step_speedup:.2f}x[/bold]" + _under_bound(study)
    )
    console.print(_stages(comparison))
    console.print(_parts(comparison))
    console.print(_by_k(study))
    console.print(_grid(study))
    if study.kinds:
        console.print(_kinds(study))
    console.print(_sensitivity(study))
    for line in _break_even(study):
        console.print(line)
    console.print("\n[bold]Assumed[/bold]")
    for line in assumptions(study.scenario):
        console.print(f"- {line}")


def print_calibration(predictions: list[Prediction]) -> None:
    """The table of ``drafttrain simulate --calibration``."""
    table = Table("published figure", "published", "ours", "error", "", title="Calibration")
    for p in predictions:
        role = "fitted" if p.figure.fitted else "held out"
        table.add_row(
            p.figure.name + ("" if p.figure.required else " *"),
            f"{p.figure.published:g}",
            f"{p.predicted:.3g}" if p.predicted < 100 else f"{p.predicted:.1f}",
            f"{100 * p.error:+.1f}%",
            role,
        )
    console = Console()
    console.print(table)
    required = [p for p in predictions if p.figure.required]
    held_out = [p for p in required if not p.figure.fitted]
    worst = max(abs(p.error) for p in required)
    console.print(
        f"median error {median_error(predictions):.1%} ({median_error(held_out):.1%} of the "
        f"{len(held_out)} held out of {len(required)}), largest {worst:.1%}; * beyond the "
        "promised set, see docs/simulator.md"
    )


def assumptions(scenario: Scenario) -> Iterable[str]:
    """What the result rests on, in sentences."""
    cluster, workload = scenario.cluster, scenario.workload
    lengths = workload.responses.sample(1024)
    capped = float((lengths >= workload.responses.cap).mean())
    yield (
        f"{workload.prompts} prompts x {workload.samples} responses of {lengths.mean():.0f} tokens "
        f"on average, {lengths.max():.0f} at most ({capped:.0%} reach the cap)"
    )
    conditional = scenario.drafter.acceptance.conditional(scenario.drafter.k)
    chances = " ".join(f"{chance:.2f}" for chance in conditional)
    yield f"chance of each draft, given those before it were accepted: {chances}"
    model = step_model(scenario)
    if not isinstance(model, Roofline):
        yield "a step costs what was fitted from an engine's own timings, at any context length"
        return
    device, engine = cluster.device, scenario.engine
    yield (
        f"kernels reach {device.bandwidth_efficiency:.0%} of the memory bandwidth and "
        f"{device.flops_efficiency:.0%} of the arithmetic rate; the parts of a step add up"
    )
    yield (
        f"the engine adds {1e3 * engine.host:.1f} ms to a step and {1e3 * engine.draft:.1f} ms to "
        "a drafting pass" + _graphs(engine.captured_tokens, engine.uncaptured_layer)
    )
    yield (
        f"at most {slots(scenario, model)} requests run at once in a replica, each with "
        f"{mean_context(scenario):.0f} tokens in its cache on average"
    )


def _graphs(captured: int | None, layer: float) -> str:
    if captured is None:
        return ""
    return f"; beyond {captured} tokens a step leaves its CUDA graphs, {1e3 * layer:.2f} ms a layer"


def _speedups(comparison: Comparison) -> dict[str, float]:
    return {
        "acceptance_length": comparison.speculation.acceptance_length,
        "generation_speedup": comparison.generation_speedup,
        "step_speedup": comparison.step_speedup,
    }


def _bound(study: Study) -> float | None:
    return study.comparison.bound if study.scenario.pipeline.lag == 0 else None


def _under_bound(study: Study) -> str:
    bound = _bound(study)
    return f" (at most {bound:.2f}x if drafting and verifying were free)" if bound else ""


def _stages(comparison: Comparison) -> Table:
    table = Table("seconds of an RL step", "no speculation", "speculation")
    before, after = comparison.baseline, comparison.speculation
    for name in before.stages:
        table.add_row(name, f"{before.stages[name]:.1f}", f"{after.stages[name]:.1f}")
    table.add_row("generation", f"{before.generation:.1f}", f"{after.generation:.1f}")
    if before.exposed != before.generation:
        table.add_row("  waited for", f"{before.exposed:.1f}", f"{after.exposed:.1f}")
        gpus = (str(run.generation_gpus) for run in (before, after))
        table.add_row("  generating GPUs", *gpus)
    table.add_row("[bold]step", f"[bold]{before.seconds:.1f}", f"[bold]{after.seconds:.1f}")
    return table


def _parts(comparison: Comparison) -> Table:
    table = Table("share of the engines' time", "no speculation", "speculation")
    before, after = (_shares(run) for run in (comparison.baseline, comparison.speculation))
    for name in before:
        if max(before[name], after[name]) >= 0.005:
            table.add_row(name, f"{before[name]:.0%}", f"{after[name]:.0%}")
    return table


def _shares(run: RunningStep) -> dict[str, float]:
    busy = sum(run.parts.values())
    return {name: seconds / busy for name, seconds in run.parts.items()}


def _by_k(study: Study) -> Table:
    table = Table("k", "acceptance length", "rollouts", "RL step")
    rows = [(str(k), entry) for k, entry in study.by_k.items()]
    for name, entry in [*rows, (f"0..{study.scenario.drafter.k} by batch", study.adaptive)]:
        length = entry.speculation.acceptance_length
        speedups = (entry.generation_speedup, entry.step_speedup)
        table.add_row(name, f"{length:.2f}", *(f"{speedup:.2f}x" for speedup in speedups))
    return table


def _grid(study: Study) -> Table:
    table = Table(
        "acceptance", *(f"k = {k}" for k in GRID_K), title="rollouts/RL step, by acceptance and k"
    )
    cells = {(cell.acceptance, cell.k): cell for cell in study.grid}
    for chance in GRID_ACCEPTANCE:
        row = [cells[chance, k] for k in GRID_K]
        table.add_row(
            f"{chance:.2f}", *(f"{c.generation_speedup:.2f}/{c.step_speedup:.2f}" for c in row)
        )
    return table


def _kinds(study: Study) -> Table:
    table = Table("at the same acceptance", "rollouts", "RL step", "pays from an acceptance of")
    for kind in study.kinds:
        needed = kind.break_even_acceptance
        speedups = (f"{value:.2f}x" for value in (kind.generation_speedup, kind.step_speedup))
        table.add_row(kind.name, *speedups, "never" if needed is None else f"{needed:.2f}")
    return table


def _sensitivity(study: Study) -> Table:
    table = Table(f"a thing {BETTER:.0%} better", "shortens the RL step by")
    for entry in study.sensitivity:
        table.add_row(entry.what, f"{entry.saved:.1%}")
    return table


def _break_even(study: Study) -> Iterable[str]:
    k, chance = study.scenario.drafter.k, study.break_even_acceptance
    at = f"at a running batch of {study.batch}"
    if chance is None:
        yield f"k = {k} never pays {at}, whatever the drafter"
    else:
        yield f"k = {k} pays {at} once each draft is accepted with a chance of {chance:.2f}"
    pays = ", ".join(f"{first} to {last}" for first, last in study.pays) or "none"
    yield f"with this drafter k = {k} pays at running batches of: {pays} ({study.fits} fit)"
    ranges = ", ".join(f"({first}, {last}, {best})" for first, last, best in study.best_k)
    yield f"best (from batch, to batch, k): {ranges}"
    online = study.online
    if study.scenario.drafter.acceptance.drift.losses(2, trained=False).any():
        yield (
            f"after {len(online.frozen)} RL steps: {online.trained[-1]:.2f}x with a drafter "
            f"trained online, {online.frozen[-1]:.2f}x with one frozen; training "
            + (f"has paid by step {online.pays_back_at}" if online.pays_back_at else "does not pay")
        )
