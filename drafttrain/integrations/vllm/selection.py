"""Which rollouts the tap keeps, and which of their rows, when it is told not to keep everything."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable

from drafttrain.integrations.vllm.settings import EngineSettings

Clock = Callable[[], float]


class Selection:
    """Decides when a request starts; used by the assembler's thread only.

    Args:
        settings: of the engine.
        clock: seconds, monotonic.
    """

    def __init__(self, settings: EngineSettings, clock: Clock = time.monotonic) -> None:
        self._fraction = settings.keep_fraction
        self._window = settings.window_tokens
        self._rate = settings.max_bytes_per_second
        self._clock = clock
        self._bytes = float(self._rate or 0)
        self._filled_at = clock()

    @property
    def rationed(self) -> bool:
        """Whether it matters what was spent before a request."""
        return self._rate is not None

    def keeps(self, group: str) -> bool:
        """Whether to keep a rollout of this prompt group; groups stay whole under a fraction."""
        if self._rate is not None and self._budget() <= 0:
            return False
        return self._fraction >= 1 or _uniform(group) < self._fraction

    def window(self, req_id: str, longest: int) -> tuple[int, int]:
        """Positions to keep of a request that may become ``longest`` tokens long: start, end."""
        if self._window is None or self._window >= longest:
            return 0, longest
        start = int(_uniform(req_id) * (longest - self._window + 1))
        return start, start + self._window

    def spend(self, nbytes: int) -> None:
        """Rows were kept. A rollout is never cut short: the budget goes into debt instead."""
        self._bytes -= nbytes

    def _budget(self) -> float:
        """Bytes left, refilled at the rate, up to a second's worth."""
        assert self._rate is not None
        now = self._clock()
        self._bytes = min(self._rate, self._bytes + self._rate * (now - self._filled_at))
        self._filled_at = now
        return self._bytes


def _uniform(name: str) -> float:
    """0 to 1, always the same for the same name."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) / 2**64
