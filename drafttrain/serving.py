"""Which version engines serve: brought to one together, whatever state each of them is in.

An engine keeps no record of what it should serve: the registry's ``latest`` does. So bringing
engines to a version is the same work whether it is new, or one of them was dead when the others
were swapped: those that serve it already are left alone, the others are swapped at the same time. A
sidecar does this again and again; without one, the same ``drafttrain swap`` once more does.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol

from drafttrain.errors import EngineError


class Swapped(Protocol):
    """What an engine says of a swap."""

    @property
    def previous(self) -> int | None: ...
    @property
    def seconds(self) -> float: ...


class Engine(Protocol):
    """An engine as those who decide what it serves see it."""

    url: str

    def drafter_version(self) -> int | None:
        """The registry version it serves.

        Raises:
            EngineError: unreachable, or without the plugin.
        """

    def swap(self, version: int) -> Swapped:
        """Make it serve `version`; returns when it does.

        Raises:
            EngineUnreachable: no answer.
            EngineError: refused, with the reason.
        """


@dataclass(frozen=True)
class Brought:
    """What became of one engine.

    Attributes:
        url: of the engine.
        previous: version it served before; None also when that is not known.
        seconds: that no step could run; None when it served the version already.
        error: why it does not serve the version; None when it does.
    """

    url: str
    previous: int | None = None
    seconds: float | None = None
    error: EngineError | None = None


def bring_to(engines: Sequence[Engine], version: int, *, canary: bool = False) -> list[Brought]:
    """Have engines serve a version, all at the same time.

    Args:
        engines: those that serve it already are left alone.
        version: of their registry.
        canary: the first one before all others; when it does not come to serve it, neither do they.

    Returns:
        what became of each, in their order.
    """
    if not engines:
        return []
    if canary:
        first = _bring(engines[0], version)
        if first.error is not None:
            spared = EngineError(f"left as it is: the canary {first.url} does not serve {version}")
            return [first, *(Brought(engine.url, error=spared) for engine in engines[1:])]
        return [first, *bring_to(engines[1:], version)]
    with ThreadPoolExecutor(len(engines), thread_name_prefix="drafttrain-swap") as threads:
        return list(threads.map(lambda engine: _bring(engine, version), engines))


def _bring(engine: Engine, version: int) -> Brought:
    try:
        serving = engine.drafter_version()
        if serving == version:
            return Brought(engine.url, serving)
        result = engine.swap(version)
        return Brought(engine.url, result.previous, result.seconds)
    except EngineError as error:
        return Brought(engine.url, error=error)


def newest_serving(engines: Sequence[Engine]) -> int | None:
    """The newest version among those that the engines which answer serve; None: no version.

    Raises:
        EngineError: none of them answers.
    """
    serving: list[int] = []
    problem: EngineError | None = None
    for engine in engines:
        try:
            serving.append(engine.drafter_version() or 0)
        except EngineError as error:
            problem = error
    if not serving and problem is not None:
        raise problem
    return max(serving, default=0) or None
