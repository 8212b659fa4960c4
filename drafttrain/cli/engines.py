"""``status``, ``swap`` and ``rollback``: what running engines serve."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from drafttrain.cli.arguments import add_command, url
from drafttrain.errors import CheckpointError, EngineError


def add_commands(commands: Any) -> None:
    for name, run, text in (
        ("status", _status, "what drafter each engine serves, its acceptance and its tap"),
        ("swap", _swap, "load a registry version into running engines"),
        ("rollback", _rollback, "put the previous version back"),
    ):
        command = add_command(commands, name, run, text)
        command.add_argument(
            "--engine", dest="engines", action="append", required=True, metavar="URL", type=url,
            help="give it once for each engine",
        )  # fmt: skip
        command.add_argument("--token-file", type=Path, help="file with the bearer token")
        command.add_argument("--json", action="store_true")
        if name != "status":
            command.add_argument("--registry", type=Path, required=True)
            command.add_argument(
                "--canary", action="store_true", help="the first engine before all others"
            )
        if name == "swap":
            command.add_argument("--version", type=int, help="default: the latest")


def _status(options: argparse.Namespace) -> None:
    statuses = [engine.status() for engine in _engines(options)]
    if options.json:
        dumped = [status.model_dump(mode="json") for status in statuses]
        print(json.dumps(dumped[0] if len(dumped) == 1 else dumped))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("engine", "drafter", "requests", "acceptance", "by position", "at k", "tap")
    for status in statuses:
        for row, of_version in enumerate(_by_version(status)):
            table.add_row(*_status_row(status, of_version, first=row == 0))
    Console().print(table)


def _by_version(status: Any) -> list[Any]:
    """What the engine counted of each version; of the one that serves, even if nothing yet."""
    from drafttrain.integrations.vllm.messages import VersionAcceptance

    counted = list(status.acceptance_by_version)
    if status.drafter_version not in [found.drafter_version for found in counted]:
        counted.append(VersionAcceptance(drafter_version=status.drafter_version))
    return counted


def _status_row(status: Any, acceptance: Any, *, first: bool) -> list[str]:
    """One drafter version of one engine, with a star if it serves.

    What is the engine's own stands in its first row.
    """
    tap = status.tap
    written = f"{tap.written} written, {tap.dropped} dropped" if tap.capturing else "off"
    method = status.method or "no speculation"
    engine = [status.engine, str(status.num_draft_tokens), tap.unavailable or written]
    name, k, about_tap = engine if first else ["", "", ""]
    version, length = acceptance.drafter_version, acceptance.acceptance_length
    serving = " *" if status.method and version == status.drafter_version else ""
    return [
        name,
        f"{version or method}{serving}",
        str(acceptance.requests),
        "" if length is None else f"{length:.2f}",
        " ".join(f"{rate:.2f}" for rate in acceptance.accepted_by_position),
        k,
        about_tap,
    ]


def _swap(options: argparse.Namespace) -> None:
    registry = _registry(options.registry)
    version = options.version if options.version is not None else registry.latest()
    if version is None:
        raise CheckpointError(options.registry, "latest", "the registry has no version")
    registry.manifest(version)
    _serve(options, registry, version)


def _rollback(options: argparse.Namespace) -> None:
    """From the newest version that an engine serves: the others may not have come to it yet."""
    from drafttrain.serving import newest_serving

    registry = _registry(options.registry)
    serving = newest_serving(_engines(options))
    previous = None if serving is None else registry.manifest(serving).parent
    if previous is None:
        problem = f"version {serving} serves and names no parent to go back to"
        raise CheckpointError(options.registry, "parent", problem)
    _serve(options, registry, previous)


def _serve(options: argparse.Namespace, registry: Any, version: int) -> None:
    """Swap, and make it the version that a sidecar keeps on the engines, once one serves it."""
    from drafttrain.serving import bring_to

    brought = bring_to(_engines(options), version, canary=options.canary)
    if any(one.error is None for one in brought):
        registry.set_latest(version)
    if options.json:
        rows = [
            {"engine": b.url, "previous": b.previous, "seconds": b.seconds,
             "error": None if b.error is None else str(b.error)}
            for b in brought
        ]  # fmt: skip
        print(json.dumps({"version": version, "engines": rows}))
    for one in brought:
        if not options.json and one.error is None:
            took = "as before" if one.seconds is None else f"{one.seconds * 1000:.0f} ms"
            print(f"{one.url}: version {version} serves (before: {one.previous}; {took})")
    failed = [str(one.error) for one in brought if one.error is not None]
    if failed:
        raise EngineError("; ".join(failed))


def _engines(options: argparse.Namespace) -> list[Any]:
    from drafttrain.integrations.vllm.client import EngineClient
    from drafttrain.integrations.vllm.control import read_token

    token = read_token(options.token_file)
    return [EngineClient(url, token) for url in options.engines]


def _registry(root: Path) -> Any:
    from drafttrain.checkpoints.registry import Registry

    return Registry.open(root)
