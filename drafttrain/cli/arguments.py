"""What the commands share: kinds of arguments, and how a command is added."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from typing import Any


def add_command(
    commands: Any, name: str, run: Callable[[argparse.Namespace], None], text: str
) -> argparse.ArgumentParser:
    """A subcommand `name`, described by `text`, that calls `run` with the parsed options."""
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(handler=run)
    return command


def print_json(document: Any) -> None:
    """Print what ``--json`` prints; JSON has no NaN and no infinity, so they are null."""
    print(json.dumps(_finite(document), allow_nan=False))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 1")
    return value


def seed(text: str) -> int:
    """An argument that is a seed."""
    value = int(text)
    if not 0 <= value < 1 << 32:
        raise argparse.ArgumentTypeError(f"{value}; expected 0 to {(1 << 32) - 1}")
    return value


def url(text: str) -> str:
    """An argument that is an engine's URL."""
    from drafttrain.config import engine_url

    try:
        return engine_url(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r:.80}; {error}") from None


def above_zero(text: str) -> float:
    """An argument that is a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value}; expected a number above 0")
    return value


def setting(text: str) -> tuple[str, str]:
    """An argument that is KEY=VALUE."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text}; expected KEY=VALUE")
    return key, value


def numbers(text: str) -> list[int]:
    """An argument that is a list of whole numbers, as 1,5,9."""
    return [int(part) for part in text.split(",")]
