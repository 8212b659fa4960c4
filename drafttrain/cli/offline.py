"""``init``, ``pretrain`` and ``eval``: a drafter from a policy and saved rollouts."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

from drafttrain.cli.arguments import (
    above_zero,
    add_command,
    numbers,
    positive,
    print_json,
    seed,
    setting,
)
from drafttrain.errors import ConfigError


def add_commands(commands: Any) -> None:
    _add_init(commands)
    _add_pretrain(
        add_command(commands, "pretrain", _pretrain, "train a drafter from saved rollouts")
    )
    _add_eval(add_command(commands, "eval", _eval, "acceptance on recorded rollouts"))


def _add_init(commands: Any) -> None:
    init = add_command(commands, "init", _init, "a new drafter for a policy")
    init.add_argument("--target", type=Path, required=True, help="the policy's folder")
    init.add_argument("--kind", choices=["eagle3", "mtp", "draft_model"], default="eagle3")
    init.add_argument("--out", type=Path, required=True, help="folder for the drafter")
    init.add_argument("--seed", type=seed, default=0)
    init.add_argument(
        "--layers", type=numbers, help="eagle3: aux layers it reads; draft_model: layers it takes"
    )
    init.add_argument("--source", type=Path, help="draft_model: a causal LM to start from")
    init.add_argument(
        "--draft-vocab", type=positive, metavar="N", help="eagle3: tokens it can draft"
    )
    init.add_argument(
        "--rollouts",
        type=Path,
        nargs="+",
        help="to choose those from: a spool, or files of any format",
    )
    init.add_argument("--skip-malformed", action="store_true", default=None, help="and count them")
    init.add_argument(
        "--set",
        type=setting,
        action="append",
        metavar="KEY=VALUE",
        help="eagle3: as layer=qwen3, num_hidden_layers=2, fc_norm=true",
    )


def _add_pretrain(pretrain: argparse.ArgumentParser) -> None:
    _add_inputs(pretrain)
    pretrain.add_argument("--drafter", type=Path, required=True, help="folder to start from")
    pretrain.add_argument("--registry", type=Path, required=True, help="where to publish it")
    pretrain.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="state, report")
    pretrain.add_argument("--resume", action="store_true", help="continue the run in --out")
    pretrain.add_argument("--steps", type=positive, help="optimizer steps at most")
    pretrain.add_argument("--tokens-per-step", type=positive)
    pretrain.add_argument("--microbatch-tokens", type=positive)
    pretrain.add_argument("--learning-rate", type=above_zero)
    pretrain.add_argument("--patience", type=positive, help="estimates without gain")
    pretrain.add_argument("--evaluate-every", type=positive, help="steps")
    pretrain.add_argument("--seed", type=seed)
    pretrain.add_argument(
        "--set", type=setting, action="append", default=[], metavar="KEY=VALUE",
        help="any other setting, as training.objective=tv; more than once",
    )  # fmt: skip
    pretrain.add_argument(
        "--memory", type=above_zero, metavar="GIB", help="fit the microbatch to this"
    )
    pretrain.add_argument("--shard", action="store_true", help="divide the drafter (FSDP2)")


def _add_eval(evaluate: argparse.ArgumentParser) -> None:
    _add_inputs(evaluate)
    evaluate.add_argument("--drafter", type=Path, required=True, nargs="+")
    evaluate.add_argument("--by", choices=["domain", "group"], help="divide the result further")
    evaluate.add_argument("--engine", action="store_true", help="count in a real vLLM as well")


def _add_inputs(command: argparse.ArgumentParser) -> None:
    """What the offline commands read."""
    command.add_argument("--target", type=Path, required=True, help="the policy's folder")
    command.add_argument(
        "--rollouts", type=Path, required=True, nargs="+", help="a spool, or files of any format"
    )
    command.add_argument("--k", type=positive, default=3, help="draft tokens")
    command.add_argument(
        "--draft-sample-method", choices=["greedy", "probabilistic"], default="probabilistic"
    )
    command.add_argument(
        "--temperature", type=above_zero, default=1.0, help="where none is recorded"
    )
    command.add_argument("--skip-malformed", action="store_true", help="and count them")
    command.add_argument("--cache", type=Path, help="keep computed features in this folder")
    command.add_argument(
        "--teacher",
        choices=["transformers", "vllm"],
        default="transformers",
        help="what runs the policy for features",
    )
    command.add_argument(
        "--policy-dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto"
    )
    command.add_argument("--device-map", help="as transformers takes it: auto, ...")
    command.add_argument("--json", action="store_true")


def _init(options: argparse.Namespace) -> None:
    import torch

    from drafttrain.drafters import KINDS, PolicyShape
    from drafttrain.outputs import check_new_folder, new_folder

    check_new_folder(options.out)
    torch.manual_seed(options.seed)
    policy = PolicyShape.from_folder(options.target)
    chosen = _init_options(options)
    drafter = KINDS[options.kind].from_policy(options.target, policy, **chosen)
    with new_folder(options.out):
        drafter.export(options.out, torch.float32)
    print(f"{options.out}: a new {options.kind} drafter for {options.target}")


def _init_options(options: argparse.Namespace) -> dict[str, Any]:
    """Those of the kind; others are refused."""
    takes = {
        "eagle3": {"layers", "draft_vocab", "rollouts", "skip_malformed", "set"},
        "draft_model": {"layers", "source"},
    }
    given = set().union(*takes.values()) & {
        name for name, value in vars(options).items() if value is not None
    }
    if foreign := given - takes.get(options.kind, set()):
        flag = min(foreign).replace("_", "-")
        raise ConfigError("init", f"--{flag}", f"is not for a drafter of kind {options.kind}")
    if options.kind == "draft_model":
        return {"layers": options.layers, "source": options.source}
    chosen: dict[str, Any] = dict(options.set or ())
    if options.layers:
        chosen["layer_ids"] = tuple(options.layers)
    if (options.draft_vocab is None) != (options.rollouts is None):
        raise ConfigError("init", "--draft-vocab", "goes with --rollouts to choose it from")
    if options.draft_vocab is not None:
        chosen["draft_ids"] = _draft_ids(options)
    return chosen


def _draft_ids(options: argparse.Namespace) -> Any:
    from drafttrain.opening import Inputs, choose_draft_ids

    inputs = Inputs(options.target, options.rollouts, skip_malformed=bool(options.skip_malformed))
    return choose_draft_ids(inputs, options.draft_vocab, print)


def _pretrain(options: argparse.Namespace) -> None:
    config = _pretrain_config(options)  # what is wrong with it is said before the slow imports
    from drafttrain.pretrain.command import PretrainCommand
    from drafttrain.pretrain.display import show_pretrain

    command = PretrainCommand(
        inputs=_inputs(options),
        drafter=options.drafter,
        registry=options.registry,
        out=options.out,
        config=config,
        resume=options.resume,
        memory=None if options.memory is None else int(options.memory * 2**30),
        sharded=options.shard,
    )
    try:
        summary = show_pretrain(command, quiet=options.json)
    except KeyboardInterrupt:
        print(f"drafttrain: interrupted; {command.kept()}", file=sys.stderr)
        raise
    if options.json and summary is not None:
        print_json(summary)


def _pretrain_config(options: argparse.Namespace) -> Any:
    from drafttrain.config import PretrainConfig, validated

    def given(*names: str) -> dict[str, Any]:
        values = {name: getattr(options, name) for name in names}
        return {name: value for name, value in values.items() if value is not None}

    training = {"draft_tokens": options.k} | given("tokens_per_step", "learning_rate", "seed")
    document: dict[str, Any] = {"training": training} | given(
        "steps", "microbatch_tokens", "evaluate_every", "patience", "draft_sample_method"
    )
    for key, value in options.set:
        *sections, name = key.split(".")
        section = document
        for part in sections:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise ConfigError("pretrain", key, "unknown key")
        section[name] = value
    return validated(PretrainConfig, document, "pretrain")


def _eval(options: argparse.Namespace) -> None:
    if options.engine:
        from drafttrain.demo import ENVIRONMENT

        os.environ.update(ENVIRONMENT)  # before torch and vLLM are imported
    from drafttrain.evaluation import print_table, show_evaluate, summaries

    inputs = _inputs(options)
    method = options.draft_sample_method
    results = show_evaluate(inputs, options.drafter, k=options.k, method=method)
    counted = None
    if options.engine:
        from drafttrain.integrations.vllm.measure import measure_drafters

        counted = measure_drafters(options.target, results[0].requests, results, options.k, method)
    rows = summaries(results, options.by, counted)
    if options.json:
        print_json(rows[0] if len(rows) == 1 else {"drafters": rows})
    else:
        print_table(rows, options.by)


def _inputs(options: argparse.Namespace) -> Any:
    # Read by transformers, whose bar for loading weights would cross ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from drafttrain.opening import Inputs
    from drafttrain.rollouts.record import TEMPERATURES, is_temperature

    if not is_temperature(options.temperature):
        problem = f"{options.temperature}; expected {TEMPERATURES}"
        raise ConfigError("drafttrain", "--temperature", problem)
    return Inputs(
        target=options.target,
        rollouts=options.rollouts,
        skip_malformed=options.skip_malformed,
        temperature=options.temperature,
        cache=options.cache,
        policy_dtype=options.policy_dtype,
        device_map=options.device_map,
        start_teacher=_engine_teacher(options) if options.teacher == "vllm" else None,
    )


def _engine_teacher(options: argparse.Namespace) -> Any:
    if options.device_map is not None:
        raise ConfigError("drafttrain", "--device-map", "is for --teacher transformers")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        problem = "vllm is for one process; let it write a --cache first, and read that with many"
        raise ConfigError("drafttrain", "--teacher", problem)
    from drafttrain.integrations.vllm.teacher import EngineTeacher

    return EngineTeacher
