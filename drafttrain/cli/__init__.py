"""The ``drafttrain`` command: parses and calls; everything heavy is imported after parsing.

Exit status 0 only when what was asked for happened; 2 for wrong usage or input, with one line on
stderr; 1 when something else went wrong that has a name in :mod:`drafttrain.errors`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import NoReturn

from drafttrain import __version__
from drafttrain.cli import checkpoints, engines, offline, runs, simulation
from drafttrain.errors import DrafttrainError


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit."""
    options = _parser().parse_args(arguments)
    try:
        options.handler(options)
    except DrafttrainError as error:
        print(f"drafttrain: {error}", file=sys.stderr)
        sys.exit(error.exit_status)
    except KeyboardInterrupt:
        sys.exit(130)
    sys.exit(0)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="drafttrain", description="Keeps a drafter in step with its policy."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for room in (runs, offline, checkpoints, engines, simulation):
        room.add_commands(commands)
    return parser
