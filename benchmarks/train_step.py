"""One Eagle3 training step against speculators and SpecForge, on this machine, in one run.

    python -m benchmarks.train_step [--json] [--quick | --scaling | --qwen3-8b] [--cells GLOB]
                                    [--peers ...]

A step is whole: batch making, forward with training-time test, loss, backward, gradient clipping
and optimizer, for everyone on the same random rollouts, with the same one-layer Llama drafter over
the full vocabulary. Each contender packs, masks and weighs as its own recipe does, in the faster of
its precisions, tried on the smallest step of each model size. All but the first token of a rollout
is drafted: prompts, which drafttrain leaves out, are not part of it. Beside it stands the floor,
the matrix products of drafttrain's step alone (``benchmarks/floor.py``).

Where there is a GPU everyone trains on it, in bfloat16. ``--qwen3-8b`` has that policy's sizes and
a draft vocabulary of 32,000; its cells of 2,048 tokens fit into 24 GB, on a CPU, too. On a GPU that
``drafttrain.simulator`` knows, the share of its peak that products reach (MFU) is counted.
"""

from __future__ import annotations

import argparse
import dataclasses
import fnmatch
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.floor import operations
from benchmarks.measure import Result, faster_precisions, measure
from benchmarks.peers import FLOOR, OURS, PEERS
from benchmarks.workload import DEVICE, GRID, QWEN3_8B, SCALING, Cell, Precision
from drafttrain.simulator.hardware import DEVICES

TOO_LARGE = "one rollout at a time needs too much memory"
QUICK = tuple(
    cell for cell in GRID if cell.tokens == 2048 and cell.rollout_length == 160 and cell.ttt == 3
)


def main(arguments: Sequence[str] | None = None) -> None:
    options = _parser().parse_args(arguments)
    grid = options.grid
    cells = [cell for cell in grid if fnmatch.fnmatch(cell.name, options.cells)]
    if not cells:
        sys.exit(f"--cells: {options.cells} names none of {', '.join(cell.name for cell in grid)}")
    rows = list(compare(cells, [] if grid is SCALING else options.peers))
    if options.json:
        print(json.dumps({"cells": rows}, indent=2))
    else:
        Console(width=120).print(_table(rows))


def compare(cells: Sequence[Cell], peers: Sequence[str]) -> Iterator[dict[str, Any]]:
    """Measure drafttrain, the floor and `peers` in each cell; yields what ``--json`` prints."""
    precisions: dict[Cell, dict[str, Precision]] = {}
    for cell in cells:
        print(f"{cell.name} …", file=sys.stderr, flush=True)
        pilot = _pilot(cell)
        if pilot not in precisions:
            precisions[pilot] = faster_precisions([OURS, *peers], pilot)
        yield row_of(cell, measure(cell, precisions[pilot]), peers)


def _pilot(cell: Cell) -> Cell:
    """The smallest step of the same model; of the smallest one where it would take an hour."""
    hidden, vocab = (256, 512) if cell.apart else (cell.hidden, cell.vocab)
    return Cell(hidden, vocab, tokens=2048, rollout_length=160, ttt=3)


def row_of(cell: Cell, results: dict[str, Result], peers: Sequence[str]) -> dict[str, Any]:
    """The JSON of one cell; ratios are against the faster and the leaner of `peers`.

    ``mfu`` is of drafttrain's step, and null where the peak of its device is not known.
    """
    speed = {name: cell.step_tokens / result.seconds for name, result in results.items()}
    peak = {name: result.peak_bytes for name, result in results.items()}
    measured = [name for name in peers if name in results]
    fastest = max((speed[name] for name in measured), default=None)
    leanest = min((peak[name] for name in measured), default=None)
    peak_flops = _peak_flops()
    return {
        **dataclasses.asdict(cell),
        "tokens_per_s": speed[OURS],
        "matmul_floor_tokens_per_s": speed[FLOOR],
        "mfu": peak_flops and operations(cell) / results[OURS].seconds / peak_flops,
        "peer_tokens_per_s": {name: speed[name] for name in measured},
        "speed_ratio": fastest and speed[OURS] / fastest,
        "peak_bytes": peak[OURS],
        "peer_peak_bytes": {name: peak[name] for name in measured},
        "memory_ratio": leanest and peak[OURS] / leanest,
        "settings": {name: result.settings for name, result in results.items()},
        "repetitions": {name: result.repetitions for name, result in results.items()},
        "skipped": {name: TOO_LARGE for name in peers if name not in results},
    }


def _peak_flops() -> float | None:
    """What the GPU's vendor states for products in bfloat16; None where that is not known."""
    if DEVICE.type != "cuda":
        return None
    name = torch.cuda.get_device_name(DEVICE).lower()
    return next((device.flops["bf16"] for key, device in DEVICES.items() if key in name), None)


def _table(rows: Sequence[dict[str, Any]]) -> Table:
    table = Table(title="tokens/s of one Eagle3 training step; peak memory above the model")
    columns = ("H", "V", "tokens", "rollout", "ttt", OURS, "of floor", "MFU", *PEERS)
    for column in (*columns, "speed", "memory"):
        table.add_column(column, justify="right")
    for row in rows:
        shape = [row[key] for key in ("hidden", "vocab", "tokens", "rollout_length", "ttt")]
        ours = row["tokens_per_s"]
        table.add_row(
            *map(str, shape),
            _speed(ours, row["peak_bytes"]),
            f"{ours / row['matmul_floor_tokens_per_s']:.0%}",
            "-" if row["mfu"] is None else f"{row['mfu']:.0%}",
            *(
                _speed(row["peer_tokens_per_s"].get(name), row["peer_peak_bytes"].get(name))
                for name in PEERS
            ),
            _ratio(row["speed_ratio"]),
            _ratio(row["memory_ratio"]),
        )
    return table


def _speed(tokens_per_s: float | None, peak_bytes: int | None) -> str:
    if tokens_per_s is None or peak_bytes is None:
        return "-"
    return f"{tokens_per_s:,.0f}  {peak_bytes / (1 << 30):5.2f} GiB"


def _ratio(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train_step", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    grid = parser.add_mutually_exclusive_group()
    parser.set_defaults(grid=GRID)
    for name, cells, text in (
        ("--quick", QUICK, "the two smallest cells"),
        ("--scaling", SCALING, "drafttrain alone, 2k to 64k tokens a step"),
        ("--qwen3-8b", QWEN3_8B, "Qwen3-8B's sizes, 2k and 16k tokens a step"),
    ):
        grid.add_argument(name, dest="grid", action="store_const", const=cells, help=text)
    parser.add_argument(
        "--cells", default="*", metavar="GLOB", help="cells whose name matches, as h256-*-r160-d3"
    )
    parser.add_argument(
        "--peers", nargs="*", choices=PEERS, default=PEERS, help="whom to compare with"
    )
    return parser


if __name__ == "__main__":
    main()
