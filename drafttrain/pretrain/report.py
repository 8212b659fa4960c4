"""What is told at the end of a run: ``report.md`` and ``report.png``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from drafttrain.checkpoints.manifest import Manifest
from drafttrain.control.acceptance import AcceptanceEstimate
from drafttrain.pretrain.run import PretrainReport

RoundCost = Callable[[int], float]
"""What a round with k draft tokens takes, in units of a policy forward without speculation."""

REPORT = "report.md"
"""A run's folder holds it once the run has ended."""


def best_k(estimates: Mapping[int, AcceptanceEstimate], cost: RoundCost) -> tuple[int, float]:
    """The number of draft tokens with the highest speedup, and that speedup.

    Args:
        estimates: acceptance at every k to choose from.
        cost: of a round.
    """
    speedups = {k: found.acceptance_length / cost(k) for k, found in estimates.items()}
    k = max(speedups, key=lambda k: speedups[k])
    return k, speedups[k]


def memory_bound_cost(drafter: Path, policy: Path) -> RoundCost:
    """The cost of a round at small batches, where time goes into reading weights: each draft token
    reads the drafter once, the verification reads the policy once.

    Args:
        drafter, policy: their folders; what their weights take there is what is read.
    """
    share = _weight_bytes(drafter) / _weight_bytes(policy)
    return lambda k: 1.0 + k * share


def write_report(
    folder: Path,
    manifest: Manifest,
    report: PretrainReport,
    estimates: Mapping[int, AcceptanceEstimate],
    cost: RoundCost,
) -> Path:
    """Write report and plot; returns the report's path."""
    folder.mkdir(parents=True, exist_ok=True)
    k, speedup = best_k(estimates, cost)
    low, high = report.acceptance.interval()
    lineage = report.lineage
    rows = [
        f"| {number} | {found.acceptance_length:.3f} "
        f"| {found.acceptance_length / cost(number):.2f}x "
        f"| {' '.join(f'{rate:.2f}' for rate in found.accepted_per_position)} |"
        for number, found in estimates.items()
    ]
    ended = "the held-out estimate had stopped gaining" if report.stopped_early else "all steps"
    text = f"""# Drafter version {manifest.version} ({manifest.kind})

Acceptance length **{report.acceptance.acceptance_length:.3f}** [{low:.3f}, {high:.3f}] on \
{len(report.acceptance.groups)} held-out rollouts.

| k | acceptance length | speedup at small batches | accepted by position |
|---|---|---|---|
{chr(10).join(rows)}

Best k: **{k}** ({speedup:.2f}x), where time goes into reading weights. Large batches want fewer.

- trained on {lineage.rollouts} rollouts, {lineage.tokens} tokens with repeats, \
{lineage.optimizer_steps} steps ({ended})
- {report.tokens_per_second:.0f} tokens/s; waited for data {report.waited:.1%} of the time; the \
policy computed features {report.taught:.1%} of it, meanwhile

![held-out acceptance length and loss](report.png)
"""
    (folder / REPORT).write_text(text)
    _plot(folder / "report.png", report)
    return folder / REPORT


def _weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _plot(path: Path, report: PretrainReport) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (top, bottom) = pyplot.subplots(2, 1, figsize=(7, 5), sharex=True)
    steps, lengths = zip(*report.history, strict=True)
    top.plot(steps, lengths, "o-", color="tab:blue")
    top.set_ylabel("held-out acceptance length")
    last = report.lineage.optimizer_steps
    first = last - len(report.losses) + 1
    bottom.plot(range(first, last + 1), report.losses, color="0.4", linewidth=0.8)
    bottom.set_ylabel("loss")
    bottom.set_xlabel("optimizer step")
    for axis in (top, bottom):
        axis.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
