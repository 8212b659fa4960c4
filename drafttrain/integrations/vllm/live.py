"""A request while it runs, on its way to becoming a rollout."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.v1.core.sched.utils import check_stop
from vllm.v1.request import RequestStatus

from drafttrain.rollouts.record import FeatureLayout, Rollout, prompt_group

Bytes = NDArray[np.uint8]


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
        self.window = (0, self.max_length)
        self.lost = self.damaged = False
        self.held_bytes = 0
        self.captured = np.zeros(self.max_length, dtype=np.bool_)
        self._max_model_len = max_model_len
        self._last: Bytes | None = None
        self._aux: Bytes | None = None
        self._stops = {sampling_params.eos_token_id, *(sampling_params.stop_token_ids or ())}
        self._watch_repetition = sampling_params.repetition_detection is not None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)

    @property
    def num_output_tokens(self) -> int:
        return len(self.output_token_ids)

    def write_rows(self, start: int, rows: Bytes, policy_version: int) -> None:
        """Rows [n, 1 + A, bytes of a state] of positions ``start`` on, as far as they are in the
        window; writing a position again replaces it."""
        first, end = max(start, self.window[0]), min(start + len(rows), self.window[1])
        if policy_version != self.policy_version:
            self.captured[:] = False
            self.policy_version = policy_version
        if end <= first:
            return
        if self._last is None or self._aux is None:
            # Zeros are not committed by the operating system before they are written to.
            _, states, width = rows.shape
            self._last = np.zeros((self.max_length, width), dtype=np.uint8)
            self._aux = np.zeros((self.max_length, states - 1, width), dtype=np.uint8)
        rows = rows[first - start : end - start]
        self._last[first:end] = rows[:, 0]
        self._aux[first:end] = rows[:, 1:]
        self.captured[first:end] = True
        self.held_bytes += rows.nbytes

    def lose_rows(self) -> None:
        self.lost = True
        self.held_bytes = 0
        self._last = self._aux = None
        self.captured[:] = False

    def append(self, sampled: list[int]) -> str | None:
        """Appends sampled tokens up to a stop.

        Returns:
            The finish reason when one of them ended the request.
        """
        near_limit = self.num_tokens + len(sampled) >= self.max_length
        if not near_limit and not self._watch_repetition and self._stops.isdisjoint(sampled):
            self.tokens += sampled
            self.output_token_ids += sampled
            return None
        for token in sampled:
            self.tokens.append(token)
            self.output_token_ids.append(token)
            if check_stop(self, self._max_model_len):
                return "length" if self.status == RequestStatus.FINISHED_LENGTH_CAPPED else "stop"
        return None

    def reason_when_ended(self) -> str | None:
        """The finish reason when the engine dropped the request before any stop of its own."""
        # A stop string is found by the front end, which then aborts: it looks the same from here.
        return None if self.sampling_params.stop else "abort"

    def rollout(self, rollout_id: str, layout: FeatureLayout, reason: str | None) -> Rollout:
        """The finished rollout; its tensors view this request's buffers."""
        length = self.num_tokens
        rejected = torch.zeros(length, dtype=torch.bool)
        rejected[[position for position in self.rejected_at if position < length]] = True
        assert self._last is not None
        assert self._aux is not None
        dtype = getattr(torch, layout.dtype)
        aux = torch.from_numpy(self._aux[:length]).view(dtype) if layout.layer_ids else None
        return Rollout(
            rollout_id=rollout_id,
            group=self.group,
            tokens=torch.tensor(self.tokens, dtype=torch.int32),
            prompt_length=self.prompt_length,
            captured=torch.from_numpy(self.captured[:length]),
            last_hidden=torch.from_numpy(self._last[:length]).view(dtype),
            aux_hidden=aux,
            policy_version=self.policy_version,
            drafter_version=self.drafter_version,
            temperature=float(self.sampling_params.temperature),
            finish_reason=reason,
            rounds=self.rounds,
            drafted=self.drafted,
            accepted=self.accepted,
            rejected=rejected,
        )
