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
from drafttrain.errors import CheckpointError, ConfigError, DrafttrainError, EngineError


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
    _add_simulate(commands)
    return parser


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


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
    init.add_argument("--kind", choices=["eagle3", "mtp", "draft_model"], default="eagle3")
    init.add_argument("--out", type=Path, required=True, help="folder for the drafter")
    init.add_argument("--seed", type=int, default=0)
    init.add_argument(
        "--layers", type=_numbers, help="eagle3: aux layers it reads; draft_model: layers it takes"
    )
    init.add_argument("--source", type=Path, help="draft_model: a causal LM to start from")
    init.add_argument(
        "--draft-vocab", type=positive, metavar="N", help="eagle3: tokens it can draft"
    )
    init.add_argument("--rollouts", type=Path, help="a spool to choose those tokens from")

    add_pretrain(_command(commands, "pretrain", pretrain, "train a drafter from saved rollouts"))
    add_eval(_command(commands, "eval", evaluate_drafters, "acceptance on recorded rollouts"))

    sidecar = _command(commands, "sidecar", _sidecar, "train online, beside an RL job")
    sidecar.add_argument("config", type=Path, metavar="CONFIG.yaml")


def _add_checkpoints(commands: Any) -> None:
    verify = _command(commands, "verify", _verify, "check a drafter folder")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--target", type=Path, help="the policy it must fit")

    export = _command(commands, "export", _export, "write a drafter in another layout")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--target", type=Path, required=True, help="the policy's folder")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument(
        "--layout",
        choices=["raw", "speculators", "policy"],
        required=True,
        help="raw: vLLM's and SGLang's; policy: an MTP head put into a copy of its policy",
    )
    export.add_argument("--k", type=positive, default=3, help="draft tokens, for speculators")

    publish = _command(commands, "publish", _publish, "put a drafter folder into a registry")
    publish.add_argument("folder", type=Path, metavar="DIR")
    publish.add_argument("--target", type=Path, required=True, help="the policy's folder")
    publish.add_argument("--registry", type=Path, required=True)

    versions = _command(commands, "versions", _versions, "list the versions in a registry")
    versions.add_argument("--registry", type=Path, required=True)
    versions.add_argument("--json", action="store_true")


def _add_engines(commands: Any) -> None:
    for name, run, text in (
        ("status", _status, "what drafter each engine serves, its acceptance and its tap"),
        ("swap", _swap, "load a registry version into running engines"),
        ("rollback", _rollback, "put the previous version back"),
    ):
        command = _command(commands, name, run, text)
        command.add_argument(
            "--engine", dest="engines", action="append", required=True, metavar="URL",
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


def _add_simulate(commands: Any) -> None:
    text = "what speculation would bring to an RL job: how much, with which k, and what limits it"
    simulate = _command(commands, "simulate", _simulate, text)
    what = simulate.add_mutually_exclusive_group(required=True)
    what.add_argument("config", type=Path, nargs="?", metavar="CONFIG.yaml")
    what.add_argument("--preset", metavar="NAME", help="a scenario that comes with drafttrain")
    what.add_argument("--list-presets", action="store_true")
    what.add_argument(
        "--calibration", action="store_true", help="every published figure beside the simulator's"
    )
    simulate.add_argument("--out", type=Path, help="folder for plots")
    simulate.add_argument("--json", action="store_true")


def _demo(options: argparse.Namespace) -> None:
    from drafttrain.demo import run_demo

    run_demo(options.out, rl_steps=options.rl_steps, seed=options.seed)


def _report(options: argparse.Namespace) -> None:
    from drafttrain.demo.report import print_report

    print_report(options.run)


def _init(options: argparse.Namespace) -> None:
    import torch

    from drafttrain.drafters import KINDS, PolicyShape

    torch.manual_seed(options.seed)
    policy = PolicyShape.from_folder(options.target)
    chosen = _init_options(options, policy.vocab_size)
    drafter = KINDS[options.kind].from_policy(options.target, policy, **chosen)
    drafter.export(options.out, torch.float32)
    print(f"{options.out}: a new {options.kind} drafter for {options.target}")


def _init_options(options: argparse.Namespace, vocab_size: int) -> dict[str, Any]:
    """Those of the kind; others are refused."""
    takes = {"eagle3": {"layers", "draft_vocab", "rollouts"}, "draft_model": {"layers", "source"}}
    given = {"layers", "draft_vocab", "rollouts", "source"} & {
        name for name, value in vars(options).items() if value is not None
    }
    if foreign := given - takes.get(options.kind, set()):
        flag = min(foreign).replace("_", "-")
        raise ConfigError("init", f"--{flag}", f"is not for a drafter of kind {options.kind}")
    if options.kind == "draft_model":
        return {"layers": options.layers, "source": options.source}
    chosen: dict[str, Any] = {"layer_ids": tuple(options.layers)} if options.layers else {}
    if options.draft_vocab is not None:
        chosen["draft_ids"] = _draft_ids(options.rollouts, vocab_size, options.draft_vocab)
    return chosen


def _draft_ids(rollouts: Path | None, vocab_size: int, size: int) -> Any:
    from drafttrain.drafters.vocabulary import choose_vocabulary
    from drafttrain.rollouts.replay import Replay

    if rollouts is None:
        raise ConfigError("init", "--rollouts", "is needed to choose a draft vocabulary")
    replay = Replay(rollouts)
    replay.refresh()
    vocabulary = choose_vocabulary(replay.training, vocab_size, size)
    print(f"draft vocabulary: {size} tokens hold {vocabulary.coverage:.2%} of those sampled")
    return vocabulary.ids


def _export(options: argparse.Namespace) -> None:
    import torch

    from drafttrain.drafters import Eagle3Drafter, MTPDrafter, PolicyShape, load_drafter

    drafter = load_drafter(options.folder, PolicyShape.from_folder(options.target))
    if options.layout == "raw":
        drafter.export(options.out, torch.float32)
    elif options.layout == "speculators" and isinstance(drafter, Eagle3Drafter):
        drafter.export_speculators(options.out, options.target, k=options.k)
    elif options.layout == "policy" and isinstance(drafter, MTPDrafter):
        drafter.stitch(options.target, options.out)
    else:
        problem = f"{options.layout}: no layout of kind {drafter.kind}"
        raise CheckpointError(options.folder, "--layout", problem)
    print(f"{options.out}: {drafter.kind} drafter, layout {options.layout}")


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


def _simulate(options: argparse.Namespace) -> None:
    from drafttrain.simulator.scenario import load_preset, load_scenario, presets

    if options.list_presets:
        names = {name: load_preset(name).title for name in presets()}
        lines = "\n".join(f"{name:20} {title}" for name, title in names.items())
        return _print_result(options.json, names, lines)
    if options.calibration:
        return _calibration(options)
    scenario = load_preset(options.preset) if options.preset else load_scenario(options.config)

    from drafttrain.simulator.report import as_json, print_study
    from drafttrain.simulator.study import study

    result = study(scenario)
    if options.json:
        print(json.dumps(as_json(result)))
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
        print(json.dumps(calibration_json(predictions)))
    else:
        print_calibration(predictions)
    if options.out:
        from drafttrain.simulator.plots import plot_calibration

        plot_calibration(predictions, options.out)


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
    statuses = [engine.status() for engine in _engines(options)]
    if options.json:
        dumped = [status.model_dump(mode="json") for status in statuses]
        print(json.dumps(dumped[0] if len(dumped) == 1 else dumped))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("engine", "drafter", "requests", "acceptance", "by position", "at k", "tap")
    for status in statuses:
        for row, of_version in enumerate(status.acceptance_by_version or [None]):
            table.add_row(*_status_row(status, of_version, first=row == 0))
    Console().print(table)


def _status_row(status: Any, acceptance: Any, *, first: bool) -> list[str]:
    """One drafter version of one engine; what is the engine's own stands in its first row."""
    tap = status.tap
    written = f"{tap.written} written, {tap.dropped} dropped" if tap.capturing else "off"
    method = status.method or "no speculation"
    engine = [status.engine, str(status.num_draft_tokens), tap.unavailable or written]
    name, k, about_tap = engine if first else ["", "", ""]
    if acceptance is None:
        return [name, str(status.drafter_version or method), "0", "", "", k, about_tap]
    version, length = acceptance.drafter_version, acceptance.acceptance_length
    serving = " *" if version == status.drafter_version else ""
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


def _print_result(as_json: bool, result: dict[str, Any], sentence: str) -> None:
    print(json.dumps(result) if as_json else sentence)
