"""vLLM's CPU sampler is wrong under speculation; ours is right."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import generate, make_engine, prompts, sampled, status
from tiny_models import VOCAB

from drafttrain.integrations.vllm import cpu_sampler

TEMPERATURE, SAMPLES = 0.7, 2500


def expected_marginals(reference: Any, prompt: list[int]) -> list[torch.Tensor]:
    """The exact distributions of the second and third sampled token, each [V]."""

    def step(tokens: torch.Tensor) -> torch.Tensor:
        return (reference(tokens).logits[:, -1] / TEMPERATURE).double().softmax(-1)

    first = step(torch.tensor([prompt]))[0]
    ids = torch.arange(VOCAB)
    two = torch.cat([torch.tensor([prompt]).expand(VOCAB, -1), ids[:, None]], dim=1)
    second = step(two)
    three = torch.cat([two.repeat_interleave(VOCAB, 0), ids.repeat(VOCAB)[:, None]], dim=1)
    likely = (first[:, None] * second).flatten()
    kept = likely > 1e-9
    third = step(three[kept])
    return [first @ second, likely[kept] @ third]


def chi_square_p(counts: Counter[int], expected: torch.Tensor) -> float:
    """Cells with fewer than five expected samples are pooled."""
    observed = torch.tensor([counts[i] for i in range(VOCAB)], dtype=torch.double)
    wanted = expected * observed.sum()
    rare = wanted < 5
    wanted = torch.cat([wanted[~rare], wanted[rare].sum()[None]])
    observed = torch.cat([observed[~rare], observed[rare].sum()[None]])
    statistic = ((observed - wanted) ** 2 / wanted.clamp_min(1e-9)).sum()
    freedom = torch.tensor((len(wanted) - 1) / 2, dtype=torch.double)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.fixture(scope="module")
def probabilistic_engine(policy: Path, registry: Any) -> Any:
    return make_engine(
        policy,
        registry.folder(2),
        {"registry": str(registry.root), "engine": "p"},
        speculative_config={"draft_sample_method": "probabilistic"},
    )


def p_values(llm: Any, reference: Any, samples: int = SAMPLES) -> list[float]:
    (prompt,) = prompts([9], salt=30)
    completions = generate(llm, [prompt], sampled(TEMPERATURE, 4, n=samples))
    return [
        chi_square_p(Counter(c[position] for c in completions), expected)
        for position, expected in enumerate(expected_marginals(reference, prompt), start=1)
    ]


def test_vllms_own_function_is_wrong_and_ours_is_right(engine: Any) -> None:
    from vllm.v1.sample import rejection_sampler

    assert rejection_sampler.expand_batch_to_tokens is cpu_sampler.expand_batch_to_tokens
    cpu_sampler.remove()
    cpu_sampler.remove()
    try:
        theirs = rejection_sampler.expand_batch_to_tokens
        assert cpu_sampler.is_faulty(theirs), "fixed upstream: the correction can go"
        ends = torch.tensor([2, 3], dtype=torch.int32)
        values = theirs(torch.tensor([0.7, 1.3]), ends, 3)
        assert not torch.equal(values, torch.tensor([0.7, 0.7, 1.3]))
    finally:
        assert cpu_sampler.apply()
        assert cpu_sampler.apply()
    assert not cpu_sampler.is_faulty(rejection_sampler.expand_batch_to_tokens)
    assert status(engine).cpu_sampler_corrected


def test_ours_expands_and_replaces() -> None:
    x, ends = torch.tensor([0.0, 5.0, 0.0]), torch.tensor([1, 3, 3])
    found = cpu_sampler.expand_batch_to_tokens(x, ends, 3, 0, 1)
    assert found.tolist() == [1.0, 5.0, 5.0]


def test_a_function_that_is_right_is_left_alone(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vllm.v1.sample import rejection_sampler

    def right(*args: Any) -> torch.Tensor:
        return cpu_sampler.expand_batch_to_tokens(*args)

    monkeypatch.setattr(rejection_sampler, "expand_batch_to_tokens", right)
    assert not cpu_sampler.apply()
    assert rejection_sampler.expand_batch_to_tokens is right


def test_sampled_outputs_are_the_policys(probabilistic_engine: Any, reference: Any) -> None:
    """A right sampler fails this once in 10,000 runs; the seeds are fixed."""
    assert min(p_values(probabilistic_engine, reference)) > 1e-4
    assert status(probabilistic_engine).acceptance.accepted > 100


def test_greedy_drafts_leave_the_distribution_alone(engine: Any, reference: Any) -> None:
    assert min(p_values(engine, reference)) > 1e-4


def test_without_the_correction_they_are_not(probabilistic_engine: Any, reference: Any) -> None:
    cpu_sampler.remove()
    try:
        assert min(p_values(probabilistic_engine, reference, samples=600)) < 1e-6
    finally:
        cpu_sampler.apply()
