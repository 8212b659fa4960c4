"""What the assembler counts, and how it is reported."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

from drafttrain.integrations.vllm.messages import Acceptance, VersionAcceptance


@dataclass(slots=True)
class Rounds:
    """Verification rounds; see :class:`~drafttrain.integrations.vllm.messages.Acceptance`."""

    rounds: int = 0
    drafted: int = 0
    accepted_per_position: list[int] = field(default_factory=list)

    def add(self, drafted: int, accepted: int, times: int) -> None:
        """So many rounds in which of so many drafts so many were accepted."""
        self.rounds += times
        self.drafted += drafted * times
        counts = self.accepted_per_position
        if len(counts) < drafted:
            counts.extend([0] * (drafted - len(counts)))
        for position in range(accepted):
            counts[position] += times

    def message(self) -> Acceptance:
        return Acceptance(
            rounds=self.rounds,
            drafted=self.drafted,
            accepted_per_position=list(self.accepted_per_position),
        )


@dataclass(slots=True)
class Counters:
    """Written by the assembler's thread, read by the engine's."""

    total: Rounds = field(default_factory=Rounds)
    by_version: defaultdict[int | None, Rounds] = field(default_factory=lambda: defaultdict(Rounds))
    requests: defaultdict[int | None, int] = field(default_factory=lambda: defaultdict(int))
    written: int = 0
    segments: int = 0
    captured_tokens: int = 0
    dropped: int = 0
    damaged: int = 0
    skipped: int = 0
    uncaptured: int = 0
    passed_over: int = 0

    def versions(self) -> list[VersionAcceptance]:
        return [
            VersionAcceptance(
                drafter_version=version,
                requests=self.requests[version],
                rounds=rounds.rounds,
                drafted=rounds.drafted,
                accepted_per_position=list(rounds.accepted_per_position),
            )
            for version, rounds in list(self.by_version.items())
        ]
