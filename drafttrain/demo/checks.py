"""What the demo proves after its last RL step: nothing changed, and what the tap costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from scipy.stats import chi2_contingency

from drafttrain.demo.arms import Arm

# Outcomes seen less often than this (both samples together) are counted as one, so that the
# chi-square approximation holds.
_RARE = 10


def greedy_identical(plain: Arm, speculating: Arm, prompts: Sequence[list[int]], eos: int) -> bool:
    """Whether greedy outputs agree token by token, in float32."""
    limit = 64
    expected = plain.rollout(prompts, limit, eos, temperature=0.0)
    return speculating.rollout(prompts, limit, eos, temperature=0.0).completions == (
        expected.completions
    )


def sampled_p_value(
    plain: Arm, speculating: Arm, prompt: list[int], eos: int, samples: int = 2000
) -> float:
    """Two-sample chi-square test of short sampled continuations of one prompt.

    The first token comes from the prefill, without drafts, so outcomes are the three after it.
    """
    counts = [
        Counter(
            tuple(completion[1:4])
            for completion in arm.rollout([prompt] * samples, 4, eos).completions
        )
        for arm in (plain, speculating)
    ]
    return two_sample_p_value(counts[0], counts[1])


def two_sample_p_value(first: Counter[tuple[int, ...]], second: Counter[tuple[int, ...]]) -> float:
    """p-value of "both counts come from one distribution"; rare outcomes are pooled."""
    together = first + second
    common = [outcome for outcome, count in together.items() if count >= _RARE]
    table = [[counts[outcome] for outcome in common] for counts in (first, second)]
    for row, counts in zip(table, (first, second), strict=True):
        row.append(counts.total() - sum(row))
    columns = [column for column in zip(*table, strict=True) if sum(column)]
    if len(columns) < 2:
        return 1.0
    return float(chi2_contingency(list(zip(*columns, strict=True))).pvalue)


def tap_overhead(
    arm: Arm, prompts: Sequence[list[int]], max_tokens: int, eos: int, pairs: int = 6
) -> float:
    """Rollout time a token with the tap on over that with it off, minus one; median of pairs."""
    ratios = []
    for pair in range(pairs):
        seconds = {}
        for capture in (True, False) if pair % 2 else (False, True):
            arm.capture(capture)
            report = arm.rollout(prompts, max_tokens, eos)
            seconds[capture] = report.seconds / report.tokens
        ratios.append(seconds[True] / seconds[False])
    arm.capture(True)
    return median(ratios) - 1.0
