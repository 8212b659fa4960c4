"""The ``eval`` command: what an engine would accept on given rollouts, drafter by drafter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import Progress
from rich.table import Column, Table
from rich.text import Text

from drafttrain.config import PretrainConfig
from drafttrain.control.acceptance import (
    AcceptanceEstimate,
    DraftSampleMethod,
    estimate_acceptance,
    usable,
)
from drafttrain.control.gate import judge
from drafttrain.drafters import load_drafter
from drafttrain.drafters.contract import Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.errors import RolloutError
from drafttrain.opening import Inputs, Say, open_corpus
from drafttrain.rollouts.record import Rollout
from drafttrain.training.corpus import Corpus
from drafttrain.training.devices import Devices
from drafttrain.training.heads import DeviceHeads

# Rollouts whose features exist at once, in padded tokens.
_MICROBATCH_TOKENS = 4096

OnPart = Callable[[int, int], None]


class Counted(Protocol):
    """What an engine counted for one drafter."""

    @property
    def acceptance_length(self) -> float: ...

    @property
    def tokens_per_second(self) -> float: ...


@dataclass(frozen=True)
class Request:
    """What it takes to sample a rollout like a recorded one.

    Attributes:
        prompt: token ids.
        max_tokens: of the completion.
        temperature: of the sampling.
    """

    prompt: list[int]
    max_tokens: int
    temperature: float


@dataclass(frozen=True)
class Evaluated:
    """How one drafter did.

    Attributes:
        drafter: its folder.
        kind: of drafter.
        estimate: over all rollouts that can be replayed.
        requests: those rollouts as an engine would be asked for them.
    """

    drafter: Path
    kind: str
    estimate: AcceptanceEstimate
    requests: list[Request]


def evaluate(
    inputs: Inputs,
    drafters: Sequence[Path],
    *,
    k: int,
    method: DraftSampleMethod,
    say: Say = lambda sentence: None,
    on_part: OnPart = lambda done, parts: None,
) -> list[Evaluated]:
    """Replay all whole rollouts with each drafter.

    Args:
        say: hears what a person should know, a sentence at a time.
        on_part: hears how many microbatches of how many a drafter has been through.

    Raises:
        CheckpointError: the policy or a drafter is wrong.
        RolloutError: the rollouts are, or none of them can be replayed.
    """
    shape = PolicyShape.from_folder(inputs.target)
    config = PretrainConfig(holdout_fraction=1.0, microbatch_tokens=_MICROBATCH_TOKENS)
    corpora: dict[tuple[tuple[int, ...], bool], Corpus] = {}
    results, devices = [], Devices()
    on_device = DeviceHeads(devices.device)
    for folder in drafters:
        drafter = devices.place(load_drafter(folder, shape))
        reads = drafter.layer_ids, drafter.reads_normed
        if reads not in corpora:
            opened = open_corpus(
                inputs, drafter.layer_ids, config, say, normed=drafter.reads_normed
            )
            corpora[reads] = opened.corpus
        drafter.check_layout(corpora[reads].layout)
        results.append(_evaluate(folder, drafter, corpora[reads], on_device, k, method, on_part))
    return results


def show_evaluate(
    inputs: Inputs, drafters: Sequence[Path], *, k: int, method: DraftSampleMethod
) -> list[Evaluated]:
    """:func:`evaluate`, with its sentences and a progress bar on stderr.

    Raises:
        DrafttrainError: as :func:`evaluate`.
    """
    console = Console(stderr=True)
    with Progress(console=console, disable=not console.is_terminal, transient=True) as progress:
        bar = progress.add_task("evaluating", total=None)

        @cache  # drafters that read different layers open the same rollouts
        def say(sentence: str) -> None:
            console.print(sentence, markup=False, soft_wrap=True)

        def show(done: int, parts: int) -> None:
            progress.update(bar, completed=done, total=parts)

        return evaluate(inputs, drafters, k=k, method=method, say=say, on_part=show)


def _evaluate(
    folder: Path,
    drafter: Drafter,
    corpus: Corpus,
    on_device: DeviceHeads,
    k: int,
    method: DraftSampleMethod,
    on_part: OnPart,
) -> Evaluated:
    parts: list[AcceptanceEstimate] = []
    requests: list[Request] = []
    for done, microbatch in enumerate(corpus.held_out):
        on_part(done, len(corpus.held_out))
        rollouts = [rollout for rollout in corpus.load(microbatch) if usable(rollout, k)]
        if not rollouts:
            continue
        layout, heads = corpus.layout, on_device.of(corpus.heads)
        parts.append(estimate_acceptance(drafter, rollouts, layout, heads, k=k, method=method))
        requests += [_request(rollout) for rollout in rollouts]
    if not parts:
        raise RolloutError("rollouts", "completions", f"none is whole and longer than {k + 1}")
    together = AcceptanceEstimate.together(parts)
    return Evaluated(folder, drafter.kind, together, requests)


def _request(rollout: Rollout) -> Request:
    prompt = rollout.tokens[: rollout.prompt_length].tolist()
    return Request(prompt, rollout.completion_length, rollout.temperature)


def summaries(
    results: Sequence[Evaluated], by: str | None = None, counted: Sequence[Counted] | None = None
) -> list[dict[str, Any]]:
    """The results as JSON has them, one object for each drafter.

    Args:
        by: "domain" or "group" divides them further.
        counted: by an engine, in the same order.
    """
    rows = []
    for index, result in enumerate(results):
        row = {"drafter": str(result.drafter), **_figures(result.estimate)}
        if by is not None:
            names = result.estimate.domains if by == "domain" else result.estimate.groups
            parts = result.estimate.divided(names)
            row[f"by_{by}"] = {name: _figures(part) for name, part in parts.items()}
        if index:
            verdict = judge(result.estimate, results[0].estimate, margin=0.0)
            row |= {"gain": verdict.gain, "gain_interval": list(verdict.interval)}
        if counted is not None:
            row["engine_acceptance_length"] = counted[index].acceptance_length
            row["engine_tokens_per_second"] = counted[index].tokens_per_second
        rows.append(row)
    return rows


def print_table(rows: Sequence[dict[str, Any]], by: str | None) -> None:
    """Show :func:`summaries` side by side."""
    # Folded, not cut: the end of a path tells versions of one registry apart.
    first = Column("drafter", overflow="fold")
    table = Table(first, "acceptance length", "interval", "by position", "rollouts")
    engine = "engine_acceptance_length" in rows[0]
    if len(rows) > 1:
        table.add_column("gain on the first")
    if engine:
        table.add_column("counted by vLLM")
    for row in rows:
        cells: list[str | Text] = [Text(row["drafter"]), *_cells(row)]
        if len(rows) > 1:
            low, high = row.get("gain_interval", (0.0, 0.0))
            cells.append(f"{row['gain']:+.3f} [{low:+.3f}, {high:+.3f}]" if "gain" in row else "")
        if engine:
            cells.append(f"{row['engine_acceptance_length']:.3f}")
        table.add_row(*cells)
        for name, part in row.get(f"by_{by}", {}).items():
            table.add_row(Text(f"  {name}"), *_cells(part))
    Console().print(table)


def _cells(figures: dict[str, Any]) -> list[str]:
    low, high = figures["interval"]
    return [
        f"{figures['acceptance_length']:.3f}",
        f"[{low:.3f}, {high:.3f}]",
        " ".join(f"{rate:.2f}" for rate in figures["accepted_per_position"]),
        str(figures["rollouts"]),
    ]


def _figures(estimate: AcceptanceEstimate) -> dict[str, Any]:
    return {
        "acceptance_length": estimate.acceptance_length,
        "accepted_per_position": estimate.accepted_per_position,
        "interval": list(estimate.interval()),
        "rollouts": len(estimate.groups),
    }
