"""``verify``, ``export``, ``publish`` and ``versions``: drafter folders and the registry."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from drafttrain.cli.arguments import add_command, positive
from drafttrain.errors import CheckpointError


def add_commands(commands: Any) -> None:
    verify = add_command(commands, "verify", _verify, "check a drafter folder")
    verify.add_argument("folder", type=Path, metavar="DIR")
    verify.add_argument("--target", type=Path, help="the policy it must fit")

    export = add_command(commands, "export", _export, "write a drafter in another layout")
    export.add_argument("folder", type=Path, metavar="DIR")
    export.add_argument("--target", type=Path, required=True, help="the policy's folder")
    export.add_argument("--out", type=Path, required=True, help="folder to write")
    export.add_argument(
        "--layout",
        choices=["raw", "speculators", "sglang", "policy"],
        required=True,
        help="raw: vLLM's own; policy: an MTP head put into a copy of its policy",
    )
    export.add_argument("--k", type=positive, default=3, help="draft tokens, for speculators")

    publish = add_command(commands, "publish", _publish, "put a drafter folder into a registry")
    publish.add_argument("folder", type=Path, metavar="DIR")
    publish.add_argument("--target", type=Path, required=True, help="the policy's folder")
    publish.add_argument("--registry", type=Path, required=True)

    versions = add_command(commands, "versions", _versions, "list the versions in a registry")
    versions.add_argument("--registry", type=Path, required=True)
    versions.add_argument("--json", action="store_true")


def _verify(options: argparse.Namespace) -> None:
    from drafttrain.checkpoints.manifest import TargetFingerprint
    from drafttrain.checkpoints.verify import verify

    target = TargetFingerprint.from_folder(options.target) if options.target else None
    verified = verify(options.folder, target)
    print(f"{options.folder}: sound, {len(verified.tensors)} tensors")


def _export(options: argparse.Namespace) -> None:
    from drafttrain.drafters import MTPDrafter, PolicyShape, load_drafter
    from drafttrain.outputs import check_new_folder, new_folder

    check_new_folder(options.out)
    drafter = load_drafter(options.folder, PolicyShape.from_folder(options.target))
    if options.layout == "policy" and isinstance(drafter, MTPDrafter):
        drafter.stitch(options.target, options.out)
    else:
        with new_folder(options.out):
            _export_drafter(drafter, options)
    print(f"{options.out}: {drafter.kind} drafter, layout {options.layout}")


def _export_drafter(drafter: Any, options: argparse.Namespace) -> None:
    import torch

    from drafttrain.drafters import Eagle3Drafter

    if options.layout == "raw":
        drafter.export(options.out, torch.float32)
    elif options.layout == "speculators" and isinstance(drafter, Eagle3Drafter):
        drafter.export_speculators(options.out, options.target, k=options.k)
    elif options.layout == "sglang" and isinstance(drafter, Eagle3Drafter):
        drafter.export_sglang(options.out)
    else:
        problem = f"{options.layout}: no layout of kind {drafter.kind}"
        raise CheckpointError(options.folder, "--layout", problem)


def _publish(options: argparse.Namespace) -> None:
    from drafttrain.checkpoints.registry import Registry
    from drafttrain.publishing import publish_folder

    manifest = publish_folder(options.folder, options.target, Registry(options.registry))
    print(f"{options.registry}: published version {manifest.version}")


def _versions(options: argparse.Namespace) -> None:
    from drafttrain.checkpoints.registry import Registry

    registry = Registry.open(options.registry)
    manifests = [registry.manifest(version) for version in registry.versions()]
    if options.json:
        rows = [manifest.model_dump(mode="json") for manifest in manifests]
        print(json.dumps({"latest": registry.latest(), "versions": rows}))
        return
    from rich.console import Console
    from rich.table import Table

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
