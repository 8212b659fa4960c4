"""What a person sees of a run: what is opened, a progress bar, and what came of it."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from drafttrain.pretrain.command import PretrainCommand, Pretrained, run_pretrain
from drafttrain.pretrain.run import Progress as Standing


def show_pretrain(command: PretrainCommand, *, quiet: bool) -> dict[str, Any] | None:
    """Run it under a progress bar; returns what ``--json`` prints, None but in the first process.

    Raises:
        DrafttrainError: as :func:`run_pretrain`.
    """
    console = Console(quiet=quiet)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed:.0f}/{task.total:.0f}"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[said]}"),
    )
    with Progress(*columns, console=console, disable=quiet) as progress:
        bar = progress.add_task("training", total=command.config.steps, said="")

        def show(now: Standing) -> None:
            said = f"{now.tokens_per_second:.0f} tokens/s  loss {now.report.loss:.3f}"
            if now.estimate is not None:
                said += f"  held out {now.estimate:.3f}"
            progress.update(bar, completed=now.report.step, total=now.steps, said=said)

        def say(sentence: str) -> None:
            console.print(sentence, markup=False)

        result = run_pretrain(command, say, show)
    if result is None:
        return None
    console.print(_sentence(result), markup=False)
    return _summary(result)


def _sentence(result: Pretrained) -> str:
    acceptance = result.manifest.acceptance
    assert acceptance is not None
    return (
        f"published version {result.manifest.version}: acceptance length "
        f"{acceptance.acceptance_length:.2f} at k {acceptance.k} on {acceptance.held_out_rollouts} "
        f"held-out rollouts; report: {result.report_path}"
    )


def _summary(result: Pretrained) -> dict[str, Any]:
    acceptance, report = result.manifest.acceptance, result.report
    assert acceptance is not None
    return {
        "version": result.manifest.version,
        **acceptance.model_dump(),
        "steps": report.lineage.optimizer_steps,
        "stopped_early": report.stopped_early,
        "history": report.history,
        "losses": report.losses,
        "tokens_per_second": report.tokens_per_second,
        "waited": report.waited,
        "report": str(result.report_path),
    }
