"""Swaps on a real server that streams to several clients: is any request lost, stalled or changed?

A ``vllm serve`` process, its policy of the demo's size, drafts probabilistically while clients keep
a streaming request in flight each, some greedy, some sampled at temperature 0.8. Registry versions
that draft well and at random are swapped in one after the other.

lost, aborted, changed_outputs
    requests without a whole answer; with finish reason "abort"; greedy ones whose tokens are not
    those of an engine without speculation.
stall_p99_steps
    99th percentile over (swap, request in flight) of the longest gap between two chunks around the
    swap's load, less the load itself and the one step that every chunk takes, in median decode
    steps; ``undisturbed_p99_steps`` is the same figure at moments before the first swap, where
    other requests' prefills and the machine's noise are all there is.
sampled_p_value
    two-sample chi-square test, at significance 0.01, of the drafted tokens of many short sampled
    continuations against those of an engine without speculation: the least p-value over prompts and
    positions times their number (Bonferroni).
"""

from __future__ import annotations

import itertools
import random
import statistics
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from typing import Any

from benchmarks.live_engine import Bench, bench, parser, print_result, say
from benchmarks.load import Load, NextRequest, Stream
from drafttrain.demo.statistics import two_sample_p_value
from drafttrain.integrations.vllm.client import EngineClient
from tests.vllm.engines import Prompt, generate, greedy, make_engine, prompts, sampled
from tests.vllm.servers import serving
from tests.vllm.tiny_models import DEEP

GREEDY_STREAMS, SAMPLED_STREAMS = 8, 2
GREEDY_TOKENS, SAMPLED_TOKENS = 48, 6
TEMPERATURE = 0.8
SIGNIFICANCE = 0.01
# Between two swaps, so that there are undisturbed steps to compare with.
PAUSE_SECONDS = (0.04, 0.1)
# Before the first, to know what requests stall without any.
QUIET_SECONDS = 20.0
# Chunks that came closer than this (seconds) lay ready together: no step went by between them.
READ_TOGETHER = 1e-3

GREEDY_PROMPTS = prompts([6 + i % 11 for i in range(32)], salt=100)
SAMPLED_PROMPTS = prompts([9, 12, 15, 18], salt=200)


@dataclass(frozen=True)
class Swap:
    """When a swap was asked for and answered, and the seconds of it that no step could run."""

    asked: float
    answered: float
    load_seconds: float


@dataclass(frozen=True)
class Expected:
    """From an engine without speculation: greedy completions, and sampled ones by prompt."""

    greedy: list[list[int]]
    sampled: list[list[list[int]]]


def expected(of: Bench, samples: int) -> Expected:
    llm = make_engine(of.policy, None, None, max_num_seqs=64, max_num_batched_tokens=2048)
    params = sampled(TEMPERATURE, SAMPLED_TOKENS, n=samples)
    return Expected(
        greedy=generate(llm, GREEDY_PROMPTS, greedy(GREEDY_TOKENS, ignore_eos=True)),
        sampled=[generate(llm, [prompt], params) for prompt in SAMPLED_PROMPTS],
    )


def sources() -> list[NextRequest]:
    """Greedy and sampled requests, each kind taking its prompts in turn."""

    def source(kind: str, batch: list[Prompt], start: int, **sampling: Any) -> NextRequest:
        turn = itertools.count(start)

        def next_request() -> tuple[str, int, dict[str, Any]]:
            index = next(turn) % len(batch)
            body = {"model": "policy", "prompt": batch[index], "return_token_ids": True}
            return kind, index, body | {"ignore_eos": True, "detokenize": False} | sampling

        return next_request

    greedy_kind = {"temperature": 0.0, "max_tokens": GREEDY_TOKENS}
    sampled_kind = {"temperature": TEMPERATURE, "max_tokens": SAMPLED_TOKENS, "n": 2}
    return [
        *(source("greedy", GREEDY_PROMPTS, 4 * i, **greedy_kind) for i in range(GREEDY_STREAMS)),
        *(source("sampled", SAMPLED_PROMPTS, i, **sampled_kind) for i in range(SAMPLED_STREAMS)),
    ]


def swap_repeatedly(client: EngineClient, count: int, versions: list[int]) -> list[Swap]:
    rng, done = random.Random(0), []
    for index in range(count):
        time.sleep(rng.uniform(*PAUSE_SECONDS))
        asked = time.perf_counter()
        result = client.swap(versions[index % len(versions)])
        done.append(Swap(asked, time.perf_counter(), result.seconds))
        if (index + 1) % 100 == 0:
            say(f"{index + 1} swaps")
    return done


def instants(seconds: float) -> list[Swap]:
    """Moments without a swap, as if each were one: what requests stall on this machine anyway."""
    found = []
    deadline = time.perf_counter() + seconds
    while (now := time.perf_counter()) < deadline:
        found.append(Swap(now, now, load_seconds=0.0))
        time.sleep(PAUSE_SECONDS[1])
    return found[len(found) // 4 :]  # the first requests warm the engine up


def median_step(streams: list[Stream], swaps: list[Swap]) -> float:
    """Seconds between two chunks of a greedy request while no swap is under way."""
    answered = [swap.answered for swap in swaps]
    gaps = []
    for stream in streams:
        for left, right in itertools.pairwise(stream.arrivals):
            after = bisect_left(answered, left)
            quiet = after == len(swaps) or right < swaps[after].asked
            if quiet and right - left > READ_TOGETHER:
                gaps.append(right - left)
    return statistics.median(gaps)


def stalls(streams: list[Stream], swaps: list[Swap], step: float) -> list[float]:
    """For every swap and request in flight across it: the longest gap, in steps, less the load and
    the request's own step."""
    found = []
    for swap in swaps:
        loading = swap.answered - swap.load_seconds
        for stream in streams:
            arrivals = stream.arrivals
            first = bisect_left(arrivals, loading)
            last = bisect_left(arrivals, swap.answered)
            if first > 0 and last < len(arrivals):
                around = itertools.pairwise(arrivals[first - 1 : last + 1])
                gap = max(right - left for left, right in around)
                found.append((gap - swap.load_seconds) / step - 1)
    return found


def p99(values: list[float]) -> float:
    return statistics.quantiles(values, n=100)[98]


def least_p_value(found: list[Stream], wanted: list[list[list[int]]]) -> float:
    p_values = []
    for prompt, reference in enumerate(wanted):
        seen = [t for s in found if s.prompt == prompt for t in s.tokens.values()]
        for position in range(1, SAMPLED_TOKENS):  # the first comes from the prefill, undrafted
            counts = [_next_tokens(tokens, position) for tokens in (seen, reference)]
            p_values.append(two_sample_p_value(*counts))
    return min(1.0, min(p_values) * len(p_values))


def _next_tokens(continuations: list[list[int]], position: int) -> Counter[tuple[int, ...]]:
    return Counter((tokens[position],) for tokens in continuations)


def judge(
    streams: list[Stream], swaps: list[Swap], quiet: list[Swap], wanted: Expected
) -> dict[str, Any]:
    greedy_ones = [stream for stream in streams if stream.kind == "greedy"]
    sampled_ones = [stream for stream in streams if stream.kind == "sampled"]
    lengths = {"greedy": GREEDY_TOKENS, "sampled": SAMPLED_TOKENS}
    lost = [
        s
        for s in streams
        if s.failure or not s.tokens or any(len(t) != lengths[s.kind] for t in s.tokens.values())
    ]
    for stream in lost[:3]:
        say(f"lost: {stream.failure or 'tokens are missing'}")
    aborted = sum("abort" in stream.finish_reasons for stream in streams)
    changed = sum(s.tokens.get(0) != wanted.greedy[s.prompt] for s in greedy_ones)
    step = median_step(greedy_ones, swaps)
    return {
        "swaps": len(swaps),
        "lost": len(lost),
        "aborted": aborted,
        "changed_outputs": changed,
        "stall_p99_steps": round(p99(stalls(greedy_ones, swaps, step)), 2),
        "sampled_p_value": least_p_value(sampled_ones, wanted.sampled),
        "significance": SIGNIFICANCE,
        "undisturbed_p99_steps": round(p99(stalls(greedy_ones, quiet, step)), 2),
        "requests": len(streams),
        "sampled_continuations": sum(len(stream.tokens) for stream in sampled_ones),
        "in_flight": GREEDY_STREAMS + SAMPLED_STREAMS,
        "step_ms": round(1000 * step, 2),
        "load_ms_median": round(1000 * statistics.median(s.load_seconds for s in swaps), 2),
        "load_ms_p99": round(1000 * p99([s.load_seconds for s in swaps]), 2),
    }


def run(swaps: int, samples: int) -> dict[str, Any]:
    with bench(DEEP) as of:
        say("engine without speculation")
        wanted = expected(of, samples)
        say("server")
        with serving(
            of.policy,
            speculative=of.speculative(),
            settings=of.settings(capture=True),
            log=of.folder / "server.log",
            arguments=("--max-num-seqs", "32"),
        ) as server:
            client = EngineClient(server.url)
            with Load(server.url, sources()) as load:
                quiet = instants(QUIET_SECONDS)
                done = swap_repeatedly(client, swaps, of.registry.versions())
            versions = client.status().acceptance_by_version
        for version in versions:
            length = version.acceptance_length or 0.0
            say(f"version {version.drafter_version}: acceptance length {length:.2f}")
        return judge(load.streams, done, quiet, wanted)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--swaps", type=int, default=1000)
    arguments.add_argument("--samples", type=int, default=4000, help="reference, a prompt")
    options = arguments.parse_args()
    print_result(run(options.swaps, options.samples), options.json)


if __name__ == "__main__":
    main()
