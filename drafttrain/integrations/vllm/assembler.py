"""The assembler: a thread that turns engine steps into rollouts.

It owns everything about running requests; the engine's thread only puts steps on its queue and
reads its counters. Should it die of an unexpected error, the traceback is printed, generation goes
on, and the status says that nothing is captured any more.
"""

from __future__ import annotations

import queue
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from drafttrain.integrations.vllm.counters import Counters
from drafttrain.integrations.vllm.live import LiveRequest
from drafttrain.integrations.vllm.rows import Part, Rows
from drafttrain.integrations.vllm.segments import Segments
from drafttrain.integrations.vllm.selection import Selection
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.integrations.vllm.steps import Ended, HeadTaken, Step
from drafttrain.integrations.vllm.stretch import Stretch
from drafttrain.rollouts.spool import SpoolWriter

# Steps gather this long before the thread takes them: each time it wakes, the engine's thread may
# have to wait for the interpreter lock, and steps together take less of it than one by one.
_GATHER_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class _Flush:
    """Everything before it on the queue is to be written now; then ``done`` is set."""

    done: threading.Event
    last: bool = False


Item = Step | Ended | HeadTaken | _Flush


class Assembler:
    """See the module.

    Args:
        settings: of the engine.
        engine: this engine's name.
        max_model_len: of the policy.
        writer: of the spool; None: acceptance is counted, rollouts are not kept.
    """

    def __init__(
        self, settings: EngineSettings, engine: str, max_model_len: int, writer: SpoolWriter | None
    ) -> None:
        self.counters = Counters()
        self._engine = engine
        self._max_model_len = max_model_len
        self._max_bytes = settings.max_buffer_bytes
        self._selection = Selection(settings)
        self._segments = None if writer is None else Segments(writer, settings, self.counters)
        self._queue: queue.SimpleQueue[Item] = queue.SimpleQueue()
        self._put_bytes = self._taken_bytes = 0  # each written by one thread only: no lock
        self._live: dict[str, LiveRequest] = {}
        self._live_bytes = 0
        self._steps: list[Step] = []  # gathered, and not yet taken
        self._ended: list[str] = []
        self._rounds: Counter[tuple[bool, int | None, int, int]] = Counter()
        self._thread = threading.Thread(target=self._run, name="drafttrain-tap", daemon=True)
        self._thread.start()

    # ---- called by the engine's thread

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def has_room(self) -> bool:
        """Whether the rows of another step fit into the queue."""
        return self._put_bytes - self._taken_bytes < self._max_bytes

    @property
    def running(self) -> int:
        return len(self._live)

    def put(self, item: Step | Ended | HeadTaken) -> None:
        if isinstance(item, Step) and item.rows is not None:
            self._put_bytes += item.rows.tensor.nbytes
        self._queue.put(item)

    def flush(self, *, last: bool = False, timeout: float = 60.0) -> bool:
        """Waits until every finished rollout is written; with ``last`` the thread ends.

        Returns:
            Whether that was done in time.
        """
        if not self.alive:
            return False
        request = _Flush(threading.Event(), last)
        self._queue.put(request)
        return request.done.wait(timeout)

    def close(self) -> None:
        """Writes what is finished and ends the thread."""
        self.flush(last=True)

    # ---- its own thread

    def _run(self) -> None:
        while True:
            for item in self._gather():
                if isinstance(item, Step):
                    self._add_step(item)
                elif isinstance(item, Ended):
                    self._ended.append(item.req_id)
                elif isinstance(item, HeadTaken):
                    self._take_steps()
                    self._take_head(item)
                else:
                    self._take_steps()
                    self._answer(item)
                    if item.last:
                        return
            self._take_steps()
            if self._segments is not None:
                self._segments.write_due(idle=not self._live)

    def _gather(self) -> list[Item]:
        """Waits until there is work, or a segment is due."""
        left = self._segments.seconds_left(idle=not self._live) if self._segments else None
        try:
            items = [self._queue.get(timeout=left)]
        except queue.Empty:
            return []
        if not isinstance(items[0], _Flush):
            time.sleep(_GATHER_SECONDS)
        while not self._queue.empty():
            items.append(self._queue.get())
        return items

    def _answer(self, flush: _Flush) -> None:
        if self._segments is not None:
            self._segments.write_all()
        flush.done.set()

    def _take_head(self, item: HeadTaken) -> None:
        if self._segments is not None:
            self._segments.layout = item.layout
            self._segments.write_head(item.wait())

    def _add_step(self, step: Step) -> None:
        """Waits for more, unless what it opens depends on what was gathered."""
        new = step.new_requests
        together = not self._steps or Stretch.together(self._steps[-1], step)
        if not together or (new and (self._selection.rationed or self._known(new))):
            self._take_steps()
        self._steps.append(step)
        for request in new:
            self._open(request, step.drafter_version)

    def _known(self, requests: list[Any]) -> bool:
        """Whether one of new requests has the id of an earlier one that is not done with."""
        return any(
            request.req_id in self._live or any(request.req_id in s.req_ids for s in self._steps)
            for request in requests
        )

    def _take_steps(self) -> None:
        """All that were gathered; nothing refers to their memory afterwards."""
        if self._steps:
            stretch = Stretch(self._steps)
            for req_id, entries in stretch.entries.items():
                live = self._live.get(req_id)
                if live is not None:
                    self._advance(live, stretch, entries)
            self._count_rounds()
        for req_id in self._ended:
            live = self._live.get(req_id)
            if live is not None:
                self._finish(live, live.reason_when_ended())
        for step in self._steps:
            if step.rows is not None:
                self._taken_bytes += step.rows.tensor.nbytes
                step.rows.release()
        self._steps, self._ended = [], []

    def _open(self, request: Any, drafter_version: int | None) -> None:
        """Follows a new request, unless more than its token ids determines its states."""
        streamed = self._live.pop(request.req_id, None)
        if streamed is not None:
            self._live_bytes -= streamed.rows.held_bytes
        if (
            streamed is not None
            or request.prompt_token_ids is None
            or request.prompt_embeds is not None
            or request.mm_features
            or request.lora_request is not None
        ):
            self.counters.skipped += 1
            return
        live = LiveRequest(
            request.req_id,
            request.prompt_token_ids,
            request.sampling_params,
            self._max_model_len,
            drafter_version,
        )
        live.kept = self._selection.keeps(live.group)
        live.rows = Rows(self._selection.window(live.req_id, live.max_length))
        self._live[request.req_id] = live
        self.counters.requests[drafter_version] += 1

    def _keep_rows(self, live: LiveRequest, parts: list[Part], policy_version: int) -> None:
        held = self._live_bytes + (self._segments.held_bytes if self._segments else 0)
        if held + sum(rows.nbytes for _, rows in parts) > self._max_bytes:
            self._lose_rows(live)
            return
        more = live.note_rows(parts, policy_version)
        self._live_bytes += more
        self._selection.spend(more)

    def _lose_rows(self, live: LiveRequest) -> None:
        self._live_bytes -= live.rows.held_bytes
        live.lose_rows()

    def _advance(self, live: LiveRequest, stretch: Stretch, entries: list[int]) -> None:
        """Tokens, rows and counts of one request."""
        known = live.num_tokens
        taken, reason = live.append([stretch.sampled[entry] for entry in entries])
        entries = entries[:taken]
        if stretch.captured and live.kept and not live.lost:
            self._keep_rows(live, stretch.rows(entries), stretch.policy_version)
        elif stretch.lost:
            self._lose_rows(live)
        for entry in entries:
            drafted, sampled = stretch.drafted[entry], len(stretch.sampled[entry])
            if drafted and sampled:
                self._count(live, stretch.drafted_by, drafted, sampled - 1, known)
            known += sampled
            # Rows reach up to the token before the newest, which was sampled from the last of them.
            end = stretch.ends[entry]
            if end != known - 1 if sampled else end > known:
                live.damaged = True
        if reason is not None:
            self._finish(live, reason)

    def _count(
        self, live: LiveRequest, drafted_by: int | None, drafted: int, accepted: int, known: int
    ) -> None:
        """A round of a request of which so many tokens were known before it."""
        live.rounds += 1
        live.drafted += drafted
        live.accepted += accepted
        if accepted < drafted:
            live.rejected_at.append(known + accepted)
        live.one_drafter &= drafted_by == live.drafter_version
        self._rounds[live.one_drafter, live.drafter_version, drafted, accepted] += 1

    def _count_rounds(self) -> None:
        """What the requests of a stretch did, all at once."""
        for (one_drafter, version, drafted, accepted), times in self._rounds.items():
            self.counters.total.add(drafted, accepted, times)
            if one_drafter:
                self.counters.by_version[version].add(drafted, accepted, times)
        self._rounds.clear()

    def _finish(self, live: LiveRequest, reason: str | None) -> None:
        del self._live[live.req_id]
        held_bytes = live.rows.held_bytes
        self._live_bytes -= held_bytes
        counters = self.counters
        if live.damaged:
            counters.damaged += 1
        elif not live.kept:
            counters.passed_over += 1
        elif live.lost:
            counters.dropped += 1
        elif self._segments is None or self._segments.layout is None or not live.rows:
            counters.uncaptured += 1
        else:
            rollout_id = f"{self._engine}:{live.req_id}"
            rollout = live.rollout(rollout_id, self._segments.layout, reason)
            self._segments.add(rollout, held_bytes)
