"""The ``drafttrain`` command: parses and calls; everything heavy is imported after parsing.

Exit status 0 only when what was asked for happened; 2 for wrong usage or input, with one line on
stderr; 1 when something else went wrong that has a name in :mod:`drafttrain.errors`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from drafttrain import __version__
from drafttrain.cli_offline import add_eval, add_pretrain, evaluate_drafters, positive, pretrain
from drafttrain.errors import CheckpointError, DrafttrainError


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
    _add_demo(commands)
    _add_training(commands)
    _add_checkpoints(commands)
    _add_engines(commands)
    return parser


def _command(commands: Any, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    command: argparse.ArgumentParser = commands.add_parser(name, help=text, description=text)
    command.set_defaults(handler=run)
    return command


def _add_demo(commands: Any) -> None:
    demo = _command(commands, "demo", _demo, "the whole loop on a small policy and a real engine")
    demo.add_argument("--out", type=Path, default=Path("runs/demo"), help="folder for the results")
    demo.add_argument("--rl-steps", type=positive, default=None, help="number of RL steps")
    demo.add_argument("--seed", type=int, default=0)
    report = _command(commands, "report", _report, "table and plot of a finished run")
    report.add_argument("run", type=Path, metavar="RUN_DIR")


def _add_training(commands: Any) -> None:
    init = _command(commands, "init", _init, "a new drafter for a policy")
    init.add_argument("--target", type=Path, required=True, help="the policy's folder")
    init.add_argument("--kind", choices=["eagle3"], default="eagle3")
    init.add_argument("--out", type=Path, required=True, help="folder for the drafter")
    init.add_argument("--seed", type=int, default=0)

    add_pretrain(_command(commands, "pretrain", pretrain, "train a drafter from saved rollouts"))
    add_eval(_command(commands, "eval", evaluate_drafters, "acceptance on recorded rollouts"))

    sidecar = _command(commands, "sidecar", _sidecar, "train online, beside an RL job")
    sidecar.add_argument("config", type=Path, metavar="CONFIG.yaml")


def _add_checkpoints(commands: Any) -> None:
    verify = _command(commands, "verify", _verify, "check a drafter folder")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--target", type=Path, help="the policy it must fit")

    publish = _command(commands, "publish", _publish, "put a drafter folder into a registry")
    publish.add_argument("folder", type=Path, metavar="DIR")
    publish.add_argument("--target", type=Path, required=True, help="the policy's folder")
    publish.add_argument("--registry", type=Path, required=True)

    versions = _command(commands, "versions", _versions, "list the versions in a registry")
    versions.add_argument("--registry", type=Path, required=True)
    versions.add_argument("--json", action="store_true")


def _add_engines(commands: Any) -> None:
    for name, run, text in (
        ("status", _status, "what drafter an engine serves, and its acceptance"),
        ("swap", _swap, "load a registry version into a running engine"),
        ("rollback", _rollback, "put the previous version back"),
    ):
        command = _command(commands, name, run, text)
        command.add_argument("--engine", required=True, metavar="URL")
        command.add_argument("--token-file", type=Path, help="file with the bearer token")
        command.add_argument("--json", action="store_true")
        if name != "status":
            command.add_argument("--registry", type=Path, required=True)
        if name == "swap":
            command.add_argument("--version", type=int, help="default: the latest")


def _demo(options: argparse.Namespace) -> None:
    from drafttrain.demo import run_demo

    run_demo(options.out, rl_steps=options.rl_steps, seed=options.seed)


def _report(options: argparse.Namespace) -> None:
    from drafttrain.demo.report import print_report

    print_report(options.run)


def _init(options: argparse.Namespace) -> None:
    import torch

    from drafttrain.drafters import KINDS, PolicyShape
    from drafttrain.drafters.policy import read_policy_head

    torch.manual_seed(options.seed)
    policy = PolicyShape.from_folder(options.target)
    drafter = KINDS[options.kind].initialise(policy)
    head = read_policy_head(options.target, policy)
    drafter.adopt_head(head.lm_head, head.final_norm)
    drafter.export(options.out, torch.float32)
    print(f"{options.out}: a new {options.kind} drafter for {options.target}")


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


def _verify(options: argparse.Namespace) -> None:
    from drafttrain.checkpoints.manifest import TargetFingerprint
    from drafttrain.checkpoints.verify import verify

    target = TargetFingerprint.from_folder(options.target) if options.target else None
    verified = verify(options.folder, target)
    print(f"{options.folder}: sound, {len(verified.tensors)} tensors")


def _publish(options: argparse.Namespace) -> None:
    from drafttrain.checkpoints.registry import Registry
    from drafttrain.publishing import publish_folder

    manifest = publish_folder(options.folder, options.target, Registry(options.registry))
    print(f"{options.registry}: published version {manifest.version}")


def _versions(options: argparse.Namespace) -> None:
    from drafttrain.checkpoints.registry import Registry

    registry = _registry(options.registry)
    manifests = [registry.manifest(version) for version in registry.versions()]
    if options.json:
        rows = [manifest.model_dump(mode="json") for manifest in manifests]
        print(json.dumps({"latest": registry.latest(), "versions": rows}))
        return
    from rich.console import Console
    from rich.table import Table

    assert isinstance(registry, Registry)
    table = Table("version", "parent", "created", "policy", "steps", "acceptance", "at k")
    for manifest in manifests:
        policies = manifest.lineage.policy_versions
        acceptance = manifest.acceptance
        table.add_row(
            f"{manifest.version}{' *' if manifest.version == registry.latest() else ''}",
            str(manifest.parent or ""),
            manifest.created_at,
            f"{policies[0]}..{policies[-1]}" if policies else "",
            str(manifest.lineage.optimizer_steps),
            f"{acceptance.acceptance_length:.2f}" if acceptance else "",
            str(acceptance.k) if acceptance else "",
        )
    Console().print(table)


def _status(options: argparse.Namespace) -> None:
    status = _engine(options).status()
    print(status.model_dump_json(indent=None if options.json else 2))


def _swap(options: argparse.Namespace) -> None:
    registry = _registry(options.registry)
    version = options.version if options.version is not None else registry.latest()
    if version is None:
        raise CheckpointError(options.registry, "latest", "the registry has no version")
    _serve(options, registry, version)


def _rollback(options: argparse.Namespace) -> None:
    registry = _registry(options.registry)
    serving = _engine(options).drafter_version()
    previous = registry.manifest(serving).parent if serving is not None else None
    if previous is None:
        problem = f"version {serving} serves and names no parent to go back to"
        raise CheckpointError(options.registry, "parent", problem)
    _serve(options, registry, previous)


def _serve(options: argparse.Namespace, registry: Any, version: int) -> None:
    """Swap, and make it the version that a sidecar keeps on the engines."""
    result = _engine(options).swap(version)
    registry.set_latest(version)
    _print_result(
        options.json,
        {"version": result.version, "previous": result.previous, "seconds": result.seconds},
        f"{options.engine}: version {result.version} serves "
        f"(before: {result.previous}; {result.seconds * 1000:.0f} ms)",
    )


def _engine(options: argparse.Namespace) -> Any:
    from drafttrain.integrations.vllm.client import EngineClient
    from drafttrain.integrations.vllm.control import read_token

    return EngineClient(options.engine, read_token(options.token_file))


def _registry(root: Path) -> Any:
    from drafttrain.checkpoints.registry import Registry

    return Registry.open(root)


def _print_result(as_json: bool, result: dict[str, Any], sentence: str) -> None:
    print(json.dumps(result) if as_json else sentence)
