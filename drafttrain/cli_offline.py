"""The offline commands, ``pretrain`` and ``eval``: what they take, and what they call."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """An argument that is a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value}; expected at least 1")
    return value


def above_zero(text: str) -> float:
    """An argument that is a number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{value}; expected a number above 0")
    return value


def add_pretrain(pretrain: argparse.ArgumentParser) -> None:
    """The arguments of ``pretrain``."""
    _add_inputs(pretrain)
    pretrain.add_argument("--drafter", type=Path, required=True, help="folder to start from")
    pretrain.add_argument("--registry", type=Path, required=True, help="where to publish it")
    pretrain.add_argument("--out", type=Path, default=Path("runs/pretrain"), help="state, report")
    pretrain.add_argument("--resume", action="store_true", help="continue the run in --out")
    pretrain.add_argument("--steps", type=positive, default=1000, help="optimizer steps at most")
    pretrain.add_argument("--tokens-per-step", type=positive, default=2048)
    pretrain.add_argument("--microbatch-tokens", type=positive, default=512)
    pretrain.add_argument("--learning-rate", type=above_zero, default=None)
    pretrain.add_argument("--patience", type=positive, default=4, help="estimates without gain")
    pretrain.add_argument("--evaluate-every", type=positive, default=50, help="steps")
    pretrain.add_argument("--seed", type=int, default=0)
    pretrain.add_argument(
        "--memory", type=above_zero, metavar="GIB", help="fit the microbatch to this"
    )
    pretrain.add_argument("--shard", action="store_true", help="divide the drafter (FSDP2)")


def add_eval(evaluate: argparse.ArgumentParser) -> None:
    """The arguments of ``eval``."""
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
    command.add_argument("--policy-dtype", default="auto")
    command.add_argument("--device-map", help="as transformers takes it: auto, ...")
    command.add_argument("--json", action="store_true")


def pretrain(options: argparse.Namespace) -> None:
    """The ``pretrain`` command."""
    from drafttrain.config import PretrainConfig, TrainingConfig
    from drafttrain.pretrain.command import PretrainCommand
    from drafttrain.pretrain.display import show_pretrain

    rate = {} if options.learning_rate is None else {"learning_rate": options.learning_rate}
    greedy = {"objective": "soft_cross_entropy"} if options.draft_sample_method == "greedy" else {}
    config = PretrainConfig(
        training=TrainingConfig(
            draft_tokens=options.k,
            tokens_per_step=options.tokens_per_step,
            seed=options.seed,
            **rate,
            **greedy,
        ),
        steps=options.steps,
        microbatch_tokens=options.microbatch_tokens,
        evaluate_every=options.evaluate_every,
        patience=options.patience,
        draft_sample_method=options.draft_sample_method,
    )
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
    summary = show_pretrain(command, quiet=options.json)
    if options.json and summary is not None:
        print(json.dumps(summary))


def evaluate_drafters(options: argparse.Namespace) -> None:
    """The ``eval`` command."""
    if options.engine:
        from drafttrain.demo import ENVIRONMENT

        os.environ.update(ENVIRONMENT)  # before torch and vLLM are imported
    from drafttrain.evaluation import evaluate, print_table, summaries

    inputs = _inputs(options)
    method = options.draft_sample_method
    results = evaluate(inputs, options.drafter, k=options.k, method=method)
    counted = None
    if options.engine:
        from drafttrain.integrations.vllm.measure import measure_drafters

        counted = measure_drafters(options.target, results[0].requests, results, options.k, method)
    rows = summaries(results, options.by, counted)
    if options.json:
        print(json.dumps(rows[0] if len(rows) == 1 else {"drafters": rows}))
    else:
        print_table(rows, options.by)


def _inputs(options: argparse.Namespace) -> Any:
    # Read by transformers, whose bar for loading weights would cross ours.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    from drafttrain.opening import Inputs

    return Inputs(
        target=options.target,
        rollouts=options.rollouts,
        skip_malformed=options.skip_malformed,
        temperature=options.temperature,
        cache=options.cache,
        policy_dtype=options.policy_dtype,
        device_map=options.device_map,
    )
