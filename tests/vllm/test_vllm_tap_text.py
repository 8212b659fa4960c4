"""Requests that end or are constrained by text: stop strings and structured output."""

from __future__ import annotations

import shutil
import string
from pathlib import Path
from typing import Any

import pytest
from engines import Rollouts, make_engine, prompts, sampled, status
from test_vllm_tap import assert_mostly_captured, assert_rows_are_the_policys, tokens_of
from tiny_models import VOCAB

from drafttrain.integrations.vllm.local import serve_engine


@pytest.fixture(scope="module")
def text_policy(policy: Path, folder: Path) -> Path:
    """The policy with a tokenizer: one character a token, as far as letters and digits go."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    goal = folder / "text-policy"
    shutil.copytree(policy, goal)
    letters = [*string.ascii_letters, *string.digits]
    tokens = ["<s>", "</s>", *letters, *(f"<{i}>" for i in range(VOCAB - 2 - len(letters)))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<s>"))
    tokenizer.decoder = decoders.Fuse()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(goal)
    return goal


@pytest.fixture(scope="module")
def text_spool(folder: Path) -> Path:
    return folder / "text-spool"


@pytest.fixture(scope="module")
def text_engine(text_policy: Path, start_drafter: Path, text_spool: Path) -> Any:
    llm = make_engine(
        text_policy,
        start_drafter,
        {"spool": str(text_spool), "engine": "text"},
        skip_tokenizer_init=False,
    )
    serve_engine(llm).close()  # tells the workers at once when the front end ends a request
    return llm


def generate(llm: Any, batch: list[list[int]], params: Any) -> list[tuple[list[int], str, str]]:
    outputs = llm.generate([{"prompt_token_ids": p} for p in batch], params, use_tqdm=False)
    completions = [output.outputs[0] for output in outputs]
    return [(list(c.token_ids), c.text, str(c.finish_reason)) for c in completions]


def test_a_stop_string_ends_the_rollout(text_engine: Any, reference: Any, text_spool: Path) -> None:
    from vllm import SamplingParams

    batch, new = prompts([12, 20, 41, 17], salt=120), Rollouts(text_spool)
    stops = list(string.ascii_lowercase)
    params = SamplingParams(temperature=1.0, max_tokens=60, stop=stops, ignore_eos=True)
    outputs = generate(text_engine, batch, params)
    assert {reason for *_, reason in outputs} == {"stop"}
    rollouts = new.wait_for(4)
    by_prompt = {tuple(r.tokens.tolist()[: r.prompt_length]): r for r in rollouts}
    for prompt, (tokens, _, _) in zip(batch, outputs, strict=True):
        rollout = by_prompt[tuple(prompt)]
        completion = rollout.tokens.tolist()[rollout.prompt_length :]
        # The engine may have verified a few tokens more than the front end then kept.
        assert completion[: len(tokens)] == tokens
        assert len(completion) <= len(tokens) + 8
        assert rollout.finish_reason is None
    assert_rows_are_the_policys(rollouts, reference)
    assert status(text_engine).tap.damaged == 0


def test_structured_output_is_captured_like_any_other(
    text_engine: Any, reference: Any, text_spool: Path
) -> None:
    """Beside requests without it: steps that mix both, and drafts that a grammar forbids."""
    from vllm import SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    batch, new = prompts([12, 20, 41, 17], salt=121), Rollouts(text_spool)
    constrained = SamplingParams(
        temperature=1.0, max_tokens=40,
        structured_outputs=StructuredOutputsParams(regex="[a-f]{20,30}"),
    )  # fmt: skip
    free = sampled(1.0, 30)
    outputs = text_engine.generate(
        [{"prompt_token_ids": prompt} for prompt in batch],
        [constrained, free, constrained, free],
        use_tqdm=False,
    )
    completions = [list(output.outputs[0].token_ids) for output in outputs]
    for output in (outputs[0], outputs[2]):
        assert set(output.outputs[0].text) <= set("abcdef")
    rollouts = new.wait_for(4)
    assert tokens_of(rollouts) == sorted(p + c for p, c in zip(batch, completions, strict=True))
    for rollout in rollouts:
        assert_mostly_captured(rollout)
    assert_rows_are_the_policys(rollouts, reference)
    assert status(text_engine).tap.damaged == 0
