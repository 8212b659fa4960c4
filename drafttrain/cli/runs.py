"""``demo``, ``report`` and ``sidecar``: what runs the loop, and what tells of it."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drafttrain.cli.arguments import add_command, positive, seed


def add_commands(commands: Any) -> None:
    demo = add_command(
        commands, "demo", _demo, "the whole loop on a small policy and a real engine"
    )
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results")
    demo.add_argument("--rl-steps", type=positive, default=None, help="number of RL steps")
    demo.add_argument("--seed", type=seed, default=0)
    report = add_command(commands, "report", _report, "table and plot of a finished run")
    report.add_argument("run", type=Path, metavar="RUN_DIR")

    sidecar = add_command(commands, "sidecar", _sidecar, "train online, beside an RL job")
    sidecar.add_argument("config", type=Path, metavar="CONFIG.yaml")


def _demo(options: argparse.Namespace) -> None:
    from drafttrain.demo import run_demo

    run_demo(options.out, rl_steps=options.rl_steps, seed=options.seed)


def _report(options: argparse.Namespace) -> None:
    from drafttrain.demo.report import print_report

    print_report(options.run)


def _sidecar(options: argparse.Namespace) -> None:
    import logging

    from drafttrain.config import load_config

    config = load_config(options.config)

    from drafttrain.integrations.vllm.client import EngineClient
    from drafttrain.integrations.vllm.control import read_token
    from drafttrain.sidecar import Sidecar, run_until_signal

    logging.basicConfig(format="%(asctime)s  %(message)s", level=logging.WARNING)
    logging.getLogger("drafttrain").setLevel(logging.INFO)
    token = read_token(config.token_file)
    engines = [EngineClient(url, token) for url in config.engines]
    run_until_signal(Sidecar(config, engines))
