"""What the demo proves after its last RL step: nothing changed, and what the tap costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from statistics import median

from drafttrain.demo.arms import Arm
from drafttrain.demo.statistics import two_sample_p_value


def greedy_identical(plain: Arm, speculating: Arm, prompts: Sequence[list[int]], eos: int) -> bool:
    """Whether greedy outputs agree token by token, in float32."""
    limit = 64
    expected = plain.rollout(prompts, limit, eos, temperature=0.0)
    return speculating.rollout(prompts, limit, eos, temperature=0.0).completions == (
        expected.completions
    )


def sampled_p_value(
    plain: Arm, speculating: Arm, prompt: list[int], eos: int, samples: int = 1000
) -> float:
    """Two-sample chi-square test of sampled continuations of one prompt, 12 tokens each.

    The first token comes from the prefill, without drafts, and is left out of the outcome.
    """
    counts = [
        Counter(
            tuple(completion[1:])
            for completion in arm.rollout([prompt] * samples, 12, eos).completions
        )
        for arm in (plain, speculating)
    ]
    return two_sample_p_value(counts[0], counts[1])


def tap_overhead(
    arm: Arm, prompts: Sequence[list[int]], max_tokens: int, eos: int, pairs: int = 10
) -> float:
    """Rollout time with the tap on over that with it off, minus one; median of pairs.

    Greedy, so that both of a pair do the same work.
    """
    ratios = []
    for pair in range(pairs):
        seconds = {}
        for capture in (True, False) if pair % 2 else (False, True):
            arm.capture(capture)
            seconds[capture] = arm.rollout(prompts, max_tokens, eos, temperature=0.0).seconds
        ratios.append(seconds[True] / seconds[False])
    arm.capture(False)
    return median(ratios) - 1.0
