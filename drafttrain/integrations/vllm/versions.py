"""Which policy and which drafter the engine runs right now."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

from drafttrain.errors import EngineError


class PolicyVersion:
    """An integer that rises whenever the policy's weights change.

    The RL job may say it (:meth:`set`); otherwise everything that changed the weights between two
    engine steps counts as one change, however many buckets it came in.
    """

    def __init__(self) -> None:
        self._number = 0
        self._touched = False

    @property
    def number(self) -> int:
        if self._touched:
            self._touched = False
            self._number += 1
        return self._number

    def touch(self) -> None:
        """The weights have changed since the last step."""
        self._touched = True

    def set(self, number: int) -> None:
        """Names the weights that are in the engine now; call it after the update.

        Raises:
            EngineError: the version would go back.
        """
        if number < self._number:
            raise EngineError(f"policy version {number} is older than {self._number}")
        self._number = number
        self._touched = False


@dataclass(frozen=True)
class DrafterVersion:
    """A version of the registry, by its number and the hash of its weights; no number: another."""

    number: int | None
    sha: str = ""

    def __str__(self) -> str:
        return "the drafter before it" if self.number is None else f"version {self.number}"


@dataclass
class Versions:
    """Shared by the tap (reads) and the swapper (writes), both in the engine's thread."""

    policy: PolicyVersion = field(default_factory=PolicyVersion)
    drafter: DrafterVersion = field(default_factory=lambda: DrafterVersion(None))
    swaps: int = 0


def watch_policy(worker: Any, policy: PolicyVersion) -> None:
    """Touches ``policy`` whenever this worker's policy weights are loaded.

    vLLM 0.32 announces weight changes to nobody. Hooked on the instances: the policy's
    ``load_weights`` (reloads, most weight-transfer engines and RL frameworks that call it
    themselves), and the worker's entry points, some of which copy tensors past it. They can go when
    vLLM keeps a version of its own weights in the worker.
    """
    model = worker.model_runner.get_model()
    _after(model, "load_weights", policy.touch)
    _after(worker, "reload_weights", policy.touch)

    def touch_unless_draft() -> None:
        if not worker._weight_update_is_draft:
            policy.touch()

    _after(worker, "update_weights", touch_unless_draft)
    _after(worker, "finish_weight_update", touch_unless_draft)


def watch_drafter(worker: Any, versions: Versions) -> None:
    """Notes that a drafter which came by vLLM's own draft updates is no registry version."""
    swaps = 0

    def note_start() -> None:
        nonlocal swaps
        swaps = versions.swaps

    def forget_unless_swapped() -> None:
        if worker._weight_update_is_draft and versions.swaps == swaps:
            versions.drafter = DrafterVersion(None)

    _after(worker, "start_draft_weight_update", note_start)
    _after(worker, "finish_weight_update", forget_unless_swapped)


def _after(owner: Any, name: str, then: Callable[[], None]) -> None:
    original = getattr(owner, name, None)
    if original is None:
        return

    @wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        finally:  # a load that failed half way has changed weights too
            then()

    setattr(owner, name, method)
