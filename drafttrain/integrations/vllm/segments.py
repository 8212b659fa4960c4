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
        self._due_at: float | None = None
        self._complained = False

    def seconds_left(self) -> float | None:
        """Until what waits is due; None when nothing waits."""
        return None if self._due_at is None else max(0.0, self._due_at - time.monotonic())

    def add(self, rollout: Rollout, held_bytes: int) -> None:
        key = (rollout.policy_version, rollout.drafter_version)
        pending = self._pending.setdefault(key, _Pending())
        pending.rollouts.append(rollout)
        pending.tokens += rollout.length
        pending.held_bytes += held_bytes
        self.held_bytes += held_bytes
        if self._due_at is None:
            self._due_at = time.monotonic() + self._settings.idle_seconds
        if pending.tokens >= self._settings.segment_tokens:
            self._write(self._pending.pop(key))

    def write_due(self) -> None:
        if self.seconds_left() == 0.0:
            self.write_all()

    def write_all(self) -> None:
        while self._pending:
            self._write(self._pending.pop(next(iter(self._pending))))
        self._due_at = None

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
