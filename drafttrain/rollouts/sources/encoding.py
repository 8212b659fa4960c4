"""From a sample to token ids: chat templates, and which tokens the policy sampled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

import numpy as np
import torch

from drafttrain.errors import RolloutError
from drafttrain.rollouts.record import TEMPERATURES, is_temperature, prompt_group
from drafttrain.rollouts.sources.samples import (
    Conversation,
    Sample,
    SavedRollout,
    Text,
    Tokens,
)

# What a template's code may raise on messages that it was not written for, besides jinja's own.
_REFUSALS = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError)


class Tokenizer(Protocol):
    """What is needed of a transformers tokenizer."""

    bos_token: str | None
    eos_token_id: int | None
    all_special_ids: list[int]
    chat_template: str | None

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]: ...

    def apply_chat_template(self, conversation: Any, **options: Any) -> Any: ...


class Encoder:
    """Makes rollouts of samples, and refuses those that cannot be one.

    The tokenizer is loaded when the first text comes: token ids need none.
    """

    def __init__(
        self,
        tokenizer: Callable[[], Tokenizer],
        vocab_size: int,
        max_length: int | None,
        temperature: float = 1.0,
    ) -> None:
        """Rollouts with ids beyond `vocab_size` or longer than `max_length` are refused.

        `temperature` is that of rollouts which do not tell theirs.
        """
        self._load = tokenizer
        self._tokenizer: Tokenizer | None = None
        self._vocab_size, self._max_length = vocab_size, max_length
        self._temperature = temperature

    def encode(self, sample: Sample, where: str) -> list[SavedRollout]:
        """One rollout, or for some conversations one for each answer (:meth:`_conversation`).

        Raises:
            RolloutError: it cannot be tokenized, or is no rollout of this policy.
        """
        if isinstance(sample, Tokens):
            return [self._rollout(sample, where)]
        if isinstance(sample, Text):
            return [self._rollout(self._text(sample), where)]
        parts = self._conversation(sample, where)
        return [self._rollout(part, where) for part in parts]

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            self._tokenizer = self._load()
        return self._tokenizer

    def _text(self, sample: Text) -> Tokens:
        """Prompt and completion are tokenized apart, as the engine met them."""
        bos = self.tokenizer.bos_token
        begins = bos is not None and sample.prompt.startswith(bos)
        prompt = self.tokenizer.encode(sample.prompt, add_special_tokens=not begins)
        completion = self.tokenizer.encode(sample.completion, add_special_tokens=False)
        if sample.facts.finish_reason == "stop" and self.tokenizer.eos_token_id is not None:
            completion.append(self.tokenizer.eos_token_id)
        generated = [False] * len(prompt) + [True] * len(completion)
        return Tokens([*prompt, *completion], generated, sample.facts)

    def _conversation(self, sample: Conversation, where: str) -> list[Tokens]:
        """One sequence with a mask where the template only appends, else one for each answer.

        Some templates drop the reasoning of earlier answers: what the policy saw before its last
        answer is then no continuation of what it saw before the first.
        """
        if not all(isinstance(tool, dict) for tool in sample.tools or ()):
            raise RolloutError(where, "tools", "expected a list of objects")
        answers = [
            index
            for index, message in enumerate(sample.messages)
            if index >= sample.first and message["role"] == "assistant"
        ]
        if not answers:
            raise RolloutError(where, "messages", "no assistant message; expected one at least")
        parts = [self._answer(sample, index, where) for index in answers]
        whole = parts[-1]
        if any(whole.tokens[: len(part.tokens)] != part.tokens for part in parts):
            name = sample.facts.rollout_id or where
            return [
                replace(part, facts=replace(part.facts, rollout_id=f"{name}-answer{number}"))
                for number, part in enumerate(parts)
            ]
        generated = list(whole.generated)
        for part in parts[:-1]:
            for position, sampled in enumerate(part.generated):
                generated[position] = generated[position] or sampled
        return [replace(whole, generated=generated)]

    def _answer(self, sample: Conversation, index: int, where: str) -> Tokens:
        """The conversation up to one answer, of which that answer was sampled."""
        before = self._render(sample, index, where, add_generation_prompt=True)
        after = self._render(sample, index + 1, where, add_generation_prompt=False)
        if after[: len(before)] != before:
            problem = "the chat template's answer does not continue its generation prompt"
            raise RolloutError(where, f"messages.{index}", problem)
        answer = after[len(before) :]
        special = [at for at, token in enumerate(answer) if token in self._special_ids()]
        # The template may go on after the end of the turn; the policy did not.
        sampled = special[-1] + 1 if special else len(answer)
        generated = [False] * len(before) + [True] * sampled
        return Tokens(after[: len(generated)], generated, sample.facts)

    def _render(
        self, sample: Conversation, stop: int, where: str, *, add_generation_prompt: bool
    ) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise RolloutError(where, "messages", "the policy's tokenizer has no chat template")
        from jinja2 import TemplateError

        try:
            rendered: list[int] = self.tokenizer.apply_chat_template(
                list(sample.messages[:stop]),
                tools=sample.tools,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=False,
            )
        except (TemplateError, *_REFUSALS) as error:
            raise RolloutError(where, "messages", f"the chat template refused: {error}") from error
        return rendered

    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)

    def _rollout(self, sample: Tokens, where: str) -> SavedRollout:
        self._check(sample.tokens, where)
        generated = torch.tensor(sample.generated, dtype=torch.bool)
        if not bool(generated.any()):
            raise RolloutError(where, "tokens", "none of them was sampled by the policy")
        rollout = SavedRollout(
            tokens=torch.from_numpy(np.asarray(sample.tokens, dtype=np.int32)),
            generated=generated,
            facts=sample.facts,
        )
        if rollout.prompt_length == 0:
            raise RolloutError(where, "tokens", "no prompt; expected one token at least")
        known = rollout.facts
        temperature = self._temperature if known.temperature is None else known.temperature
        if not is_temperature(temperature):
            raise RolloutError(where, "temperature", f"{temperature}; expected {TEMPERATURES}")
        facts = replace(
            known,
            rollout_id=known.rollout_id or where,
            group=known.group or prompt_group(sample.tokens[: rollout.prompt_length]),
            temperature=temperature,
        )
        return replace(rollout, facts=facts)

    def _check(self, tokens: Sequence[int], where: str) -> None:
        lowest, highest = min(tokens, default=0), max(tokens, default=0)
        if lowest < 0 or highest >= self._vocab_size:
            problem = f"id {lowest if lowest < 0 else highest}; the policy has {self._vocab_size}"
            raise RolloutError(where, "tokens", problem)
        if self._max_length is not None and len(tokens) > self._max_length:
            problem = f"{len(tokens)}; the policy's longest context is {self._max_length}"
            raise RolloutError(where, "tokens", problem)
