"""A request while it runs, on its way to becoming a rollout."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import RequestStatus

from drafttrain.integrations.vllm.rows import Part, Rows, States
from drafttrain.rollouts.record import FeatureLayout, Rollout, prompt_group


class LiveRequest:
    """Tokens, rows and counts of one request.

    ``drafter_version`` is the one it started under; ``one_drafter`` says whether only that one has
    drafted for it.

    Also answers to what vLLM's ``check_stop`` asks of a request, so that a stop is judged here as
    the scheduler judges it: the worker is told of it only at the next step, and after the last
    request of a batch there may be none for a long time.
    """

    pooling_params = None
    stop_reason: int | str | None = None
    status: Any = None

    def __init__(
        self,
        req_id: str,
        prompt: list[int],
        sampling_params: Any,
        max_model_len: int,
        drafter_version: int | None,
    ) -> None:
        """Args: as vLLM's ``NewRequestData`` has them, and the drafter version that serves."""
        self.req_id = req_id
        self.sampling_params = sampling_params
        self.tokens = list(prompt)
        self.output_token_ids: list[int] = []
        self.prompt_length = len(prompt)
        self.max_tokens = sampling_params.max_tokens or max_model_len
        self.max_length = min(max_model_len, self.prompt_length + self.max_tokens)
        self.drafter_version = drafter_version
        self.policy_version = 0
        self.rounds = self.drafted = self.accepted = 0
        self.rejected_at: list[int] = []
        self.one_drafter = True
        self.group = prompt_group(prompt)
        self.kept = True
        self.rows = Rows((0, self.max_length))
        self.lost = self.damaged = False
        self._max_model_len = max_model_len
        self._stops = {sampling_params.eos_token_id, *(sampling_params.stop_token_ids or ())}
        self._watch_repetition = sampling_params.repetition_detection is not None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    def note_rows(self, parts: Iterable[Part], policy_version: int) -> int:
        """Copies rows; those of an older policy are forgotten.

        Returns:
            By how many bytes more is held.
        """
        before = self.rows.held_bytes
        if policy_version != self.policy_version:
            self.rows.clear()
            self.policy_version = policy_version
        self.rows.note(parts)
        return self.rows.held_bytes - before

    def lose_rows(self) -> None:
        self.lost = True
        self.rows.clear()

    def append(self, sampled: Sequence[list[int]]) -> tuple[int, str | None]:
        """Appends what steps sampled, up to a stop.

        Returns:
            How many of the steps it took; the finish reason when the last of them ended the
            request.
        """
        tokens = list(chain.from_iterable(sampled))
        near_limit = len(self.tokens) + len(tokens) >= self.max_length
        if not near_limit and not self._watch_repetition and self._stops.isdisjoint(tokens):
            self.tokens += tokens
            self.output_token_ids += tokens
            return len(sampled), None
        for steps, ids in enumerate(sampled, 1):
            for token in ids:
                self.tokens.append(token)
                self.output_token_ids.append(token)
                if check_stop(self, self._max_model_len):
                    capped = self.status == RequestStatus.FINISHED_LENGTH_CAPPED
                    return steps, "length" if capped else "stop"
        return len(sampled), None

    def reason_when_ended(self) -> str | None:
        """The finish reason when the engine dropped the request before any stop of its own."""
        # A stop string is found by the front end, which then aborts: it looks the same from here.
        return None if self.sampling_params.stop else "abort"

    def rollout(self, rollout_id: str, layout: FeatureLayout, reason: str | None) -> Rollout:
        """The finished rollout; its rows are no longer here."""
        length = self.num_tokens
        last, aux, captured = self.rows.take(length)
        rejected = np.zeros(length, dtype=np.bool_)
        rejected[[position for position in self.rejected_at if position < length]] = True
        dtype = getattr(torch, layout.dtype)
        return Rollout(
            rollout_id=rollout_id,
            group=self.group,
            tokens=torch.from_numpy(np.array(self.tokens, dtype=np.int32)),
            prompt_length=self.prompt_length,
            captured=torch.from_numpy(captured),
            last_hidden=_tensor(last, dtype),
            aux_hidden=_tensor(aux, dtype) if layout.layer_ids else None,
            policy_version=self.policy_version,
            drafter_version=self.drafter_version,
            temperature=float(self.sampling_params.temperature),
            finish_reason=reason,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            rejected=torch.from_numpy(rejected),
        )


def _tensor(states: States, dtype: torch.dtype) -> torch.Tensor:
    """[..., H], viewing them."""
    as_bytes = states.view(np.uint8).reshape(*states.shape, states.itemsize)
    return torch.from_numpy(as_bytes).view(dtype)
