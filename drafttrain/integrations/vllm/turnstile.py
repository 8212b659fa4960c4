"""Turns between an engine's own loop and calls from another thread."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any


class Turnstile:
    """A lock that cannot be taken twice in a row while somebody waits for it.

    An engine that steps in a tight loop would starve a plain lock's other waiters: it takes the
    lock back before they have woken up. Here everyone waits for the lock while holding the gate, so
    the loop cannot pass the gate again before the one in it has had its turn. A thread that holds
    the lock passes freely.
    """

    def __init__(self) -> None:
        self._gate = threading.Lock()
        self._lock = threading.Lock()
        self._owner: int | None = None

    @contextmanager
    def turn(self) -> Iterator[None]:
        """Waits for a turn and holds it."""
        me = threading.get_ident()
        if self._owner == me:
            yield
            return
        with self._gate:
            self._lock.acquire()
        self._owner = me
        try:
            yield
        finally:
            self._owner = None
            self._lock.release()

    def guard(self, owner: Any, name: str) -> None:
        """Makes every call of a method take a turn; harmless when repeated on the same owner."""
        original: Callable[..., Any] = getattr(owner, name)

        @wraps(original)
        def method(*args: Any, **kwargs: Any) -> Any:
            with self.turn():
                return original(*args, **kwargs)

        setattr(owner, name, method)
