"""Finished rollouts on their way into the spool."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from drafttrain.errors import RolloutError, SpoolError
from drafttrain.integrations.vllm.counters import Counters
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout
from drafttrain.rollouts.spool import SpoolWriter

logger = logging.getLogger(__name__)

# A segment holds rollouts of one policy version and one drafter version.
_Key = tuple[int, int | None]


@dataclass(slots=True)
class _Pending:
    rollouts: list[Rollout] = field(default_factory=list)
    tokens: int = 0
    held_bytes: int = 0


class Segments:
    """Collects rollouts and writes a segment when it is long enough or has waited long enough.

    Used by the assembler's thread only.
    """

    def __init__(self, writer: SpoolWriter, settings: EngineSettings, counters: Counters) -> None:
        self.layout: FeatureLayout | None = None
        self.held_bytes = 0
        self._writer = writer
        self._settings = settings
        self._counters = counters
        self._pending: dict[_Key, _Pending] = {}
        self._first_at = self._last_at = 0.0  # when what waits came
        self._complained = False

    def seconds_left(self, *, idle: bool) -> float | None:
        """Until what waits is due; None when nothing waits. `idle`: no request is running."""
        if not self._pending:
            return None
        due = self._first_at + self._settings.busy_seconds
        if idle:
            due = min(due, self._last_at + self._settings.idle_seconds)
        return max(0.0, due - time.monotonic())

    def add(self, rollout: Rollout, held_bytes: int) -> None:
        any_waited = bool(self._pending)
        key = (rollout.policy_version, rollout.drafter_version)
        pending = self._pending.setdefault(key, _Pending())
        pending.rollouts.append(rollout)
        pending.tokens += rollout.length
        pending.held_bytes += held_bytes
        self.held_bytes += held_bytes
        self._last_at = time.monotonic()
        if not any_waited:
            self._first_at = self._last_at
        if pending.tokens >= self._settings.segment_tokens:
            self._write(self._pending.pop(key))

    def write_due(self, *, idle: bool) -> None:
        if self.seconds_left(idle=idle) == 0.0:
            self.write_all()

    def write_all(self) -> None:
        while self._pending:
            self._write(self._pending.pop(next(iter(self._pending))))

    def write_head(self, head: PolicyHead) -> None:
        self._attempt(lambda: self._writer.write_head(head))

    def _write(self, pending: _Pending) -> None:
        layout, rollouts = self.layout, pending.rollouts
        assert layout is not None
        self.held_bytes -= pending.held_bytes
        if self._writer.full or not self._attempt(lambda: self._writer.write(rollouts, layout)):
            self._counters.dropped += len(rollouts)
            return
        self._counters.written += len(rollouts)
        self._counters.segments += 1
        self._counters.captured_tokens += sum(int(r.captured.sum()) for r in rollouts)

    def _attempt(self, write: Callable[[], object]) -> bool:
        """A spool that cannot be written costs rollouts, counted; the log says it once."""
        try:
            write()
        except (SpoolError, RolloutError) as error:
            if not self._complained:
                logger.error("drafttrain drops rollouts: %s", error)
            self._complained = True
            return False
        self._complained = False
        return True
