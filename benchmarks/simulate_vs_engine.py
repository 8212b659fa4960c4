"""Holds the simulator against a real vLLM engine on this CPU, with k = 0 to 5 draft tokens.

Engines of one small policy, one for each k, generate batches of responses whose lengths have a
long tail, so that the running batch shrinks. Every engine step is timed. :class:`EngineCost` is
fitted to the steps of some k, and acceptance by position is read from the engine with the most
drafts; with these the simulator predicts tokens per second of every k and batch, of which only the
fitted k were seen before. Seconds are of this process's computing time on one core, and rounds of
all engines alternate: others may use the machine meanwhile.

    python -m benchmarks.simulate_vs_engine [--policy DIR --drafter DIR] [--json]

Without folders both are made on the spot, untrained: speed does not depend on what they know.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

KS = (0, 1, 2, 3, 4, 5)
FITTED_KS = (0, 2, 5)
BATCHES = (1, 4, 16)
ROUNDS = 8
PROMPT = 14
MAX_MODEL_LEN = 256


@dataclass
class Engine:
    """A vLLM engine with k draft tokens, whose steps are timed.

    Attributes:
        steps: seconds of its pure decoding steps, by running batch.
    """

    k: int
    llm: Any
    steps: dict[int, list[float]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        engine = self.llm.llm_engine
        step, scheduler = engine.step, engine.engine_core.engine_core.scheduler

        def timed() -> Any:
            # Requests still waiting are prefilled in this step.
            batch = 0 if scheduler.waiting else len(scheduler.running)
            start = time.process_time()
            outputs = step()
            if batch:
                self.steps[batch].append(time.process_time() - start)
            return outputs

        engine.step = timed

    def generate(self, lengths: np.ndarray) -> float:
        """Tokens per second of computing of one batch of responses of given lengths."""
        from vllm import SamplingParams

        sampling = [
            SamplingParams(temperature=1.0, max_tokens=n, ignore_eos=True, detokenize=False)
            for n in lengths.astype(int).tolist()
        ]
        prompts = [{"prompt_token_ids": list(range(2, 2 + PROMPT))} for _ in sampling]
        start = time.process_time()
        self.llm.generate(prompts, sampling, use_tqdm=False)
        return float(lengths.sum() / (time.process_time() - start))

    def accepted_per_position(self) -> list[float]:
        """Fraction of rounds that accepted each position, from the engine's counters."""
        from drafttrain.integrations.vllm.local import serve_engine

        with serve_engine(self.llm) as server:
            acceptance = server.status().acceptance
        return [accepted / acceptance.rounds for accepted in acceptance.accepted_per_position]


def main() -> None:
    """Measure, fit, predict, print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--policy", type=Path)
    parser.add_argument("--drafter", type=Path)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    from drafttrain.demo import ENVIRONMENT

    os.environ.update(ENVIRONMENT)
    from drafttrain.demo.processes import ENGINE_CORES, use_cores

    use_cores(ENGINE_CORES)
    with tempfile.TemporaryDirectory() as made:
        policy, drafter = options.policy, options.drafter
        if policy is None or drafter is None:
            policy, drafter = make_models(Path(made))
        print(f"starting {len(KS)} engines", file=sys.stderr)
        engines = [start_engine(policy, drafter, k) for k in KS]
        measured = measure(engines)
    result = judge(engines, measured)
    print(json.dumps(result) if options.json else as_text(result))


def make_models(folder: Path) -> tuple[Path, Path]:
    """An untrained policy of the demo's shape, and a drafter for it."""
    import torch

    from drafttrain.demo.policy import Recipe, new_policy
    from drafttrain.demo.task import Task
    from drafttrain.drafters import KINDS, PolicyShape

    policy, drafter = folder / "policy", folder / "drafter"
    new_policy(Task(), Recipe(), layers=24).save_pretrained(policy)
    shape = PolicyShape.from_folder(policy)
    KINDS["eagle3"].from_policy(policy, shape).export(drafter, torch.float32)
    return policy, drafter


def start_engine(policy: Path, drafter: Path, k: int) -> Engine:
    """An engine with k probabilistic draft tokens; k = 0: without a drafter."""
    from vllm import LLM

    speculation = {
        "method": "eagle3",
        "model": str(drafter),
        "num_speculative_tokens": k,
        "draft_sample_method": "probabilistic",
    }
    llm = LLM(
        str(policy),
        dtype="float32",
        skip_tokenizer_init=True,
        enforce_eager=True,
        enable_prefix_caching=False,
        max_model_len=MAX_MODEL_LEN,
        max_num_seqs=max(BATCHES),
        num_gpu_blocks_override=200,
        speculative_config=speculation if k else None,
        additional_config={"drafttrain": {"engine": f"k{k}"}},
        disable_log_stats=True,
    )
    return Engine(k, llm)


def lengths_of(batch: int) -> np.ndarray:
    """Response lengths of a batch: a long tail, ascending; float64 [batch]."""
    from drafttrain.simulator.scenario import Responses

    return np.floor(Responses(median=40, spread=0.6, cap=120).sample(batch))


def measure(engines: list[Engine]) -> dict[tuple[int, int], float]:
    """Median tokens per second by (k, batch)."""
    rates: dict[tuple[int, int], list[float]] = defaultdict(list)
    for engine in engines:
        engine.generate(lengths_of(max(BATCHES)))  # what is slow the first time only
        engine.steps.clear()
    for done in range(ROUNDS):
        print(f"round {done + 1} of {ROUNDS}", file=sys.stderr)
        for batch in BATCHES:
            for engine in engines:
                rates[engine.k, batch].append(engine.generate(lengths_of(batch)))
    return {key: float(np.median(values)) for key, values in rates.items()}


def judge(engines: list[Engine], measured: dict[tuple[int, int], float]) -> dict[str, Any]:
    """Fit to the steps of some engines and predict all."""
    from drafttrain.control.economics import EngineCost, StepTiming

    timings = [
        StepTiming(batch, engine.k, float(np.mean(seconds)))
        for engine in engines
        if engine.k in FITTED_KS
        for batch, seconds in engine.steps.items()
    ]
    cost = EngineCost.fit(timings)
    accepted = engines[-1].accepted_per_position()
    rows = [
        {
            "k": k,
            "batch": batch,
            "measured": rate,
            "predicted": (predicted := predict(cost, accepted, k, batch)),
            "error": predicted / rate - 1.0,
            "held_out": k not in FITTED_KS,
        }
        for (k, batch), rate in sorted(measured.items())
    ]
    errors = [abs(row["error"]) for row in rows if row["held_out"]]
    return {
        "cost": cost.model_dump(),
        "accepted_per_position": accepted,
        "runs": rows,
        "median_error_held_out": float(np.median(errors)),
        "largest_error": max(abs(row["error"]) for row in rows),
        "best_k": {
            str(batch): {
                "measured": max(KS, key=lambda k: measured[k, batch]),
                "predicted": cost.best_k(batch, accepted),
            }
            for batch in BATCHES
        },
    }


def predict(cost: Any, accepted: list[float], k: int, batch: int) -> float:
    """Tokens per second of one batch, by the simulator."""
    from drafttrain.control.economics import acceptance_length
    from drafttrain.simulator.fleet import Fleet, Speculation
    from drafttrain.simulator.roofline import Measured

    lengths = lengths_of(batch)[None, :]
    speculation = Speculation.fixed(k, acceptance_length(k, accepted), batch)
    fleet = Fleet(Measured(cost), speculation, replicas=1, prompt_tokens=PROMPT)
    fleet.submit(lengths, at=0.0)
    # Responses here are of few steps, so the one that reads the prompts in counts as well.
    return float(lengths.sum() / (cost.step + fleet.complete(batch)))


def as_text(result: dict[str, Any]) -> str:
    """A table for people."""
    cost = {name: f"{1e3 * seconds:.3f} ms" for name, seconds in result["cost"].items()}
    accepted = " ".join(f"{rate:.2f}" for rate in result["accepted_per_position"])
    lines = [f"cost of a step: {cost}", f"accepted by position: {accepted}", ""]
    lines.append("  k  batch  measured  predicted   error  (tokens/s of one core; * held out)")
    for row in result["runs"]:
        mark = "*" if row["held_out"] else " "
        lines.append(
            f"{row['k']:3}{mark}{row['batch']:6}{row['measured']:10.0f}{row['predicted']:11.0f}"
            f"{100 * row['error']:+8.1f}%"
        )
    lines.append(
        f"median error of held-out k: {result['median_error_held_out']:.1%}; "
        f"largest of all: {result['largest_error']:.1%}"
    )
    lines.append(f"best k by batch: {result['best_k']}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
