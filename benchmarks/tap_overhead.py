"""What capturing costs an engine: the same rollouts with the tap on and off, in pairs.

An engine in this process, of the demo's size (24 layers, 128 wide, batch 16, k = 3), generates the
same prompts with everything captured and with capturing switched off, in alternating order. Both of
a pair do the same work, because they are greedy, and are short, so that both meet the same machine;
rollouts end and segments are written all the way through each.

overhead
    median over pairs of the time a token takes with the tap on over that with it off, minus one.
interval
    95% confidence interval of that median, from the order statistics of the pairs.
cpu_overhead
    the same of the process's CPU time, all threads together: what it would be on a single core.
"""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import Any

from scipy.stats import binom

from benchmarks.live_engine import K, bench, parser, print_result, say
from tests.vllm.engines import generate, greedy, make_engine, prompts, status
from tests.vllm.tiny_models import DEEP

BATCH, REQUESTS = 16, 32
TOKENS = (8, 40)


@dataclass(frozen=True)
class Cost:
    """Of one completion token, in seconds."""

    wall: float
    cpu: float


def cost(llm: Any, salt: int) -> Cost:
    shortest, longest = TOKENS
    lengths = [shortest + i * (longest - shortest) // REQUESTS for i in range(REQUESTS)]
    params = [greedy(length, ignore_eos=True) for length in lengths]
    batch = prompts([24] * REQUESTS, salt)
    wall, cpu = time.perf_counter(), time.process_time()
    completions = generate(llm, batch, params)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    llm.collective_rpc("drafttrain_flush")  # what is left is not the next run's
    tokens = sum(map(len, completions))
    return Cost(wall / tokens, cpu / tokens)


def pair(llm: Any, index: int) -> tuple[Cost, Cost]:
    """With the tap on, and with it off; which of them comes first alternates."""
    costs = {}
    for capture in (True, False) if index % 2 else (False, True):
        llm.collective_rpc("drafttrain_capture", args=(capture,))
        costs[capture] = cost(llm, salt=index)
    return costs[True], costs[False]


def median_interval(values: list[float], level: float = 0.95) -> tuple[float, float]:
    """Of the median, without assuming a distribution."""
    ordered = sorted(values)
    low = int(binom.ppf((1 - level) / 2, len(ordered), 0.5))
    return ordered[max(low - 1, 0)], ordered[min(len(ordered) - low, len(ordered) - 1)]


def run(pairs: int) -> dict[str, Any]:
    with bench(DEEP, versions=2) as of:
        llm = make_engine(
            of.policy, None, of.settings(),
            speculative_config=of.speculative(2), enable_prefix_caching=False,
            max_num_batched_tokens=2048, max_num_seqs=BATCH,
        )  # fmt: skip
        cost(llm, salt=0)
        measured = []
        for index in range(pairs):
            measured.append(pair(llm, index))
            if (index + 1) % 20 == 0:
                say(f"{index + 1} pairs")
        after = status(llm)
        wall = [on.wall / off.wall - 1 for on, off in measured]
        cpu = [on.cpu / off.cpu - 1 for on, off in measured]
        return {
            "overhead": statistics.median(wall),
            "interval": median_interval(wall),
            "cpu_overhead": statistics.median(cpu),
            "cpu_interval": median_interval(cpu),
            "pairs": pairs,
            "tokens_per_s": 1 / statistics.median(off.wall for _, off in measured),
            "acceptance_length": after.acceptance.acceptance_length,
            "draft_tokens": K,
            "captured_tokens": after.tap.captured_tokens,
            "dropped": after.tap.dropped,
        }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--pairs", type=int, default=60)
    options = arguments.parse_args()
    print_result(run(options.pairs), options.json)


if __name__ == "__main__":
    main()
