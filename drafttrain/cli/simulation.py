"""``simulate``: what speculation would bring to an RL job that does not exist yet."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from drafttrain.cli.arguments import add_command, print_json


def add_commands(commands: Any) -> None:
    text = "what speculation would bring to an RL job: how much, with which k, and what limits it"
    simulate = add_command(commands, "simulate", _simulate, text)
    what = simulate.add_mutually_exclusive_group(required=True)
    what.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    what.add_argument("--preset", metavar="NAME", help="a scenario that comes with drafttrain")
    what.add_argument("--list-presets", action="store_true")
    what.add_argument(
        "--calibration", action="store_true", help="every published figure beside the simulator's"
    )
    simulate.add_argument("--out", type=Path, help="folder for plots")
    simulate.add_argument("--json", action="store_true")


def _simulate(options: argparse.Namespace) -> None:
    from drafttrain.simulator.scenario import load_preset, load_scenario, presets

    if options.list_presets:
        names = {name: load_preset(name).title for name in presets()}
        if options.json:
            print_json(names)
        else:
            print("\n".join(f"{name:20} {title}" for name, title in names.items()))
        return
    if options.calibration:
        _calibration(options)
        return
    scenario = load_preset(options.preset) if options.preset else load_scenario(options.config)

    from drafttrain.simulator.report import as_json, print_study
    from drafttrain.simulator.study import study

    result = study(scenario)
    if options.json:
        print_json(as_json(result))
    else:
        print_study(result)
    if options.out:
        from drafttrain.simulator.plots import plot_study

        plot_study(result, options.out)


def _calibration(options: argparse.Namespace) -> None:
    from drafttrain.simulator.calibration import figures, predict
    from drafttrain.simulator.report import calibration_json, print_calibration

    predictions = predict(figures())
    if options.json:
        print_json(calibration_json(predictions))
    else:
        print_calibration(predictions)
    if options.out:
        from drafttrain.simulator.plots import plot_calibration

        plot_calibration(predictions, options.out)
