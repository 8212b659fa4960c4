"""The engine side of one vLLM worker: made when the engine starts, asked through worker methods."""

from __future__ import annotations

import atexit
from functools import wraps
from pathlib import Path
from typing import Any

import vllm

from drafttrain import __version__
from drafttrain.errors import EngineError
from drafttrain.integrations.vllm import cpu_sampler
from drafttrain.integrations.vllm.assembler import Assembler
from drafttrain.integrations.vllm.counters import Counters
from drafttrain.integrations.vllm.heads import keep_own_head, keep_own_head_v2
from drafttrain.integrations.vllm.messages import EngineStatus, Prepared, SwapResult, TapCounters
from drafttrain.integrations.vllm.runners import runner_of
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.integrations.vllm.swap import Swapper
from drafttrain.integrations.vllm.tap import Tap, find_parts
from drafttrain.integrations.vllm.transfer import NamedDrafterTransfer
from drafttrain.integrations.vllm.versions import Versions, watch_drafter, watch_policy
from drafttrain.rollouts.spool import SpoolWriter


def before_loading(worker: Any, settings: EngineSettings) -> None:
    """To be called once the worker has a model runner, and no models in it yet."""
    if settings.registry is None:
        return
    _pin_start_version(worker.vllm_config.speculative_config)
    if worker.vllm_config.use_v2_model_runner:
        keep_own_head_v2()
        return
    proposer = getattr(worker.model_runner, "drafter", None)
    if hasattr(proposer, "_maybe_share_lm_head"):
        keep_own_head(proposer)


def _pin_start_version(speculative: Any) -> None:
    """Makes of a link such as ``latest`` the version that it names now.

    It may move before vLLM has read the weights, and what this engine serves would then be told
    wrong.
    """
    draft = speculative.draft_model_config if speculative is not None else None
    if draft is not None and Path(draft.model).is_symlink():
        speculative.model = draft.model = str(Path(draft.model).resolve())


class EngineSide:
    """Everything drafttrain has in a worker.

    Args:
        worker: vLLM's, with its models loaded.
        settings: of the engine.
    """

    def __init__(self, worker: Any, settings: EngineSettings) -> None:
        self._worker = worker
        self._settings = settings
        self._name = _engine_name(worker, settings)
        self.versions = Versions()
        self._swapper = Swapper(worker, settings, self.versions)
        self._assembler: Assembler | None = None
        self._tap: Tap | None = None
        parts, self._no_parts = find_parts(worker)
        if parts is not None:
            # Every tensor-parallel rank computes the same states; the first one keeps them.
            if worker.rank % worker.parallel_config.tensor_parallel_size == 0:
                self._assembler = self._start_assembler()
            capturing = settings.capture and settings.spool is not None
            runner = runner_of(worker)
            self._tap = Tap(runner, parts, self.versions, self._assembler, capturing=capturing)
        watch_policy(worker, self.versions.policy)
        watch_drafter(worker, self.versions)
        if isinstance(worker.weight_transfer_engine, NamedDrafterTransfer):
            worker.weight_transfer_engine.swap = self._swapper.swap
        self._keep_through_sleep(worker)
        self._close_with(worker)

    def status(self) -> EngineStatus:
        speculative = self._worker.vllm_config.speculative_config
        drafter = self.versions.drafter
        counters = self._assembler.counters if self._assembler else Counters()
        return EngineStatus(
            plugin=__version__,
            vllm=vllm.__version__,
            engine=self._name,
            method=speculative.method if speculative else None,
            num_draft_tokens=speculative.num_speculative_tokens if speculative else 0,
            draft_sample_method=speculative.draft_sample_method if speculative else None,
            policy_version=self.versions.policy.number,
            drafter_version=drafter.number,
            drafter_sha=drafter.sha or None,
            swaps=self.versions.swaps,
            acceptance=counters.total.message(),
            acceptance_by_version=counters.versions(),
            tap=self._tap_counters(counters),
            cpu_sampler_corrected=cpu_sampler.in_force(),
        )

    def prepare(self, version: int) -> Prepared:
        """As :meth:`Swapper.prepare`."""
        return Prepared(ready=self._swapper.prepare(version))

    def swap(self, version: int) -> SwapResult:
        """As :meth:`Swapper.swap`."""
        return self._swapper.swap(version)

    def capture(self, enabled: bool) -> None:
        """Switches capturing on or off.

        Raises:
            EngineError: it cannot be switched on here.
        """
        if enabled and self._settings.spool is None:
            raise EngineError("this engine was started without the setting `spool`")
        if self._tap is None or (enabled and self._unavailable is not None):
            raise EngineError(f"nothing can be captured: {self._unavailable}")
        self._tap.capturing = enabled

    def flush(self) -> bool:
        """Waits until every finished rollout is in the spool; returns whether all of them are."""
        return self._assembler is None or self._assembler.flush()

    @property
    def _unavailable(self) -> str | None:
        """Why nothing can be captured from this policy."""
        return self._no_parts if self._tap is None else self._tap.unavailable

    def _start_assembler(self) -> Assembler:
        settings, writer = self._settings, None
        if settings.spool is not None:
            writer = SpoolWriter(settings.spool, self._name, max_bytes=settings.max_spool_bytes)
        max_model_len = self._worker.model_config.max_model_len
        return Assembler(settings, self._name, max_model_len, writer)

    def _tap_counters(self, counters: Counters) -> TapCounters:
        assembler, unavailable = self._assembler, self._unavailable
        alive = assembler is not None and assembler.alive
        if unavailable is None and not alive:
            unavailable = "its thread has ended; the engine's log says why"
        return TapCounters(
            capturing=alive and self._tap is not None and self._tap.capturing,
            unavailable=unavailable,
            written=counters.written,
            segments=counters.segments,
            captured_tokens=counters.captured_tokens,
            dropped=counters.dropped,
            damaged=counters.damaged,
            skipped=counters.skipped,
            uncaptured=counters.uncaptured,
            passed_over=counters.passed_over,
            running=assembler.running if assembler else 0,
        )

    def _keep_through_sleep(self, worker: Any) -> None:
        """Loads the drafter again after a level-2 sleep, which gives up its weights.

        vLLM leaves that to whoever woke it, and RL jobs think of the policy's alone: a drafter of
        uninitialised memory accepts nothing and says nothing. Hooked on the instance; it can go
        when vLLM keeps or reloads a drafter's weights itself.
        """
        sleep, wake_up = worker.sleep, worker.wake_up
        deepest = 0

        @wraps(sleep)
        def note_and_sleep(level: int = 1) -> None:
            nonlocal deepest
            self._swapper.fell_asleep()
            deepest = max(deepest, level)
            sleep(level)

        @wraps(wake_up)
        def wake_up_and_reload(tags: list[str] | None = None) -> None:
            nonlocal deepest
            wake_up(tags)
            if tags is None or "weights" in tags:
                self._swapper.woke_up(emptied=deepest > 1)
                deepest = 0

        worker.sleep, worker.wake_up = note_and_sleep, wake_up_and_reload

    def _close_with(self, worker: Any) -> None:
        """Writes the last rollouts when the worker goes, or the process does."""
        assembler, shutdown = self._assembler, worker.shutdown
        if assembler is None:
            return

        @wraps(shutdown)
        def close_and_shutdown() -> None:
            assembler.close()
            atexit.unregister(assembler.close)
            shutdown()

        worker.shutdown = close_and_shutdown
        atexit.register(assembler.close)


def _engine_name(worker: Any, settings: EngineSettings) -> str:
    """Data-parallel engines share their settings, and must not share a name."""
    parallel = worker.parallel_config
    if parallel.data_parallel_size == 1:
        return settings.engine
    return f"{settings.engine}-dp{parallel.data_parallel_index}"
