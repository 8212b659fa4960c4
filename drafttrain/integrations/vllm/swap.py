"""A registry version into the running drafter, or, when that fails, the old one back.

vLLM's reload (``layerwise``) cannot go back: hence everything that can be checked is checked before
it, and what served is loaded again when it fails. All of it happens in one worker call, between two
engine steps.
"""

from __future__ import annotations

import logging
import time
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.model_loader import get_model_loader

from drafttrain.checkpoints.formats import with_defaults
from drafttrain.checkpoints.manifest import TargetFingerprint, read_json
from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import CONFIG, WEIGHTS, Verified, verify
from drafttrain.errors import EngineError
from drafttrain.integrations.vllm.fit import Names, check_config, check_tensors
from drafttrain.integrations.vllm.layerwise import Weights, layerwise_load
from drafttrain.integrations.vllm.messages import SwapResult
from drafttrain.integrations.vllm.ranks import all_agree
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.integrations.vllm.versions import DrafterVersion, Versions

logger = logging.getLogger(__name__)

# A new method needs its names in ``fit`` and a round-trip test.
METHODS = ("eagle3", "mtp", "draft_model")


@dataclass(frozen=True)
class _Checkpoint:
    where: str
    verified: Verified
    drafter: DrafterVersion


class Swapper:
    """Changes the drafter of one worker.

    Args:
        worker: vLLM's, with its models loaded.
        settings: name the registry.
        versions: told about every swap.
    """

    def __init__(self, worker: Any, settings: EngineSettings, versions: Versions) -> None:
        self._worker = worker
        self._speculative = worker.vllm_config.speculative_config
        self._settings = settings
        self._versions = versions
        self._serving: Verified | None = None  # None: the one vLLM was started with
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="drafttrain-read")
        self._prepared: dict[int, Future[_Checkpoint]] = {}
        self._asleep = False
        versions.drafter = self._loaded = self._started_with()

    def prepare(self, version: int) -> bool:
        """Reads and verifies a version in a thread of its own, while the engine generates.

        Returns:
            Whether that is done; ask again until it is, then :meth:`swap` only has to load.

        Raises:
            CheckpointError, EngineError: as :meth:`swap`.
        """
        if not self._reading(version).done():
            return False
        self._read_by_now(version)
        return True

    def swap(self, version: int) -> SwapResult:
        """Makes a registry version the drafter, on every tensor-parallel rank or on none.

        A collective: every rank is told to at the same moment. While the engine sleeps the version
        is only remembered, and loaded when it wakes up.

        Raises:
            CheckpointError: unknown, damaged or unfitting version; the old drafter serves on.
            EngineError: no registry or no drafter here, loading failed, or another rank refused;
                says what serves now.
        """
        started = time.perf_counter()
        before = self._versions.drafter
        new = self._agreed(version)
        if not self._asleep:
            self._load_or_restore(new, f"loading drafter version {version} failed")
        self._prepared.clear()
        self._serving = new.verified
        self._versions.drafter = new.drafter
        self._versions.swaps += 1
        return SwapResult(
            version=version,
            previous=before.number,
            seconds=time.perf_counter() - started,
            sha=new.drafter.sha,
        )

    def fell_asleep(self) -> None:
        """The engine's memory may not be touched from here on."""
        self._asleep = True

    def woke_up(self, *, emptied: bool) -> None:
        """The weights are back in memory; ``emptied``: without their values (level-2 sleep).

        What cannot be loaded now is logged and shows in the status: an RL job that wakes its engine
        must not fail over a drafter.
        """
        stale = emptied or self._versions.drafter != self._loaded
        if self._asleep and stale and self._method in METHODS:
            try:
                self._load(self._weights_to_serve())
                self._loaded = self._versions.drafter
            except Exception as error:  # noqa: BLE001  vLLM's loaders raise whatever they like
                self._versions.drafter = self._loaded = DrafterVersion(None)
                logger.error("drafttrain could not load the drafter after a sleep: %s", error)
        self._asleep = False

    def _agreed(self, version: int) -> _Checkpoint:
        """The version, read and found to fit by every rank."""
        refusal: Exception | None = None
        sha = ""
        try:
            new = self._read_by_now(version)
            sha = new.drafter.sha
            tp = self._worker.parallel_config.tensor_parallel_size
            check_tensors(new.where, new.verified.tensors, self._names(), self._drafter(), tp=tp)
        except Exception as error:  # noqa: BLE001  raised below: the other ranks wait for this one
            refusal = error
        if all_agree(refusal is None, sha):
            return new
        raise refusal or EngineError("another tensor-parallel rank refuses it; none swaps")

    def _reading(self, version: int) -> Future[_Checkpoint]:
        self._drafter()
        if version not in self._prepared:
            self._prepared[version] = self._reader.submit(self._read, self._registry(), version)
        return self._prepared[version]

    def _read_by_now(self, version: int) -> _Checkpoint:
        reading = self._reading(version)
        if reading.exception() is not None:
            del self._prepared[version]  # it may be mended
        return reading.result()

    def _read(self, registry: Registry, version: int) -> _Checkpoint:
        """In the reader's thread."""
        manifest = registry.manifest(version)  # holds the version against the folder's name
        folder = registry.folder(version)
        target = TargetFingerprint.from_config(self._worker.model_config.hf_config.to_dict())
        verified = verify(folder, target)
        check_config(str(folder), verified.config, self._running_config())
        drafter = DrafterVersion(version, manifest.files[WEIGHTS])
        return _Checkpoint(str(folder), self._converted(verified), drafter)

    def _converted(self, verified: Verified) -> Verified:
        """With matrices in the dtype the drafter runs in, so that loading only copies.

        Vectors are few, and some models keep theirs in float32 whatever they run in.
        """
        dtype = self._speculative.draft_model_config.dtype
        tensors = {
            name: tensor.to(dtype) if tensor.is_floating_point() and tensor.dim() > 1 else tensor
            for name, tensor in verified.tensors.items()
        }
        return replace(verified, tensors=tensors)

    def _load_or_restore(self, new: _Checkpoint, failure: str) -> None:
        before = self._versions.drafter
        problem: Exception | None = None
        try:
            self._load(new.verified.tensors.items())
        except Exception as error:  # noqa: BLE001  whatever it is, the old drafter comes back
            problem = error
        if all_agree(problem is None):
            self._loaded = new.drafter
            return
        reason = problem or "on another tensor-parallel rank"
        try:
            self._load(self._weights_to_serve())
        except Exception as error:  # whatever it is, what serves now must be told
            self._versions.drafter = self._loaded = DrafterVersion(None)
            lost = f"{before} could not be restored either: {error}"
            raise EngineError(f"{failure}: {reason}; {lost}") from error
        raise EngineError(f"{failure}: {reason}; {before} is restored") from problem

    def _load(self, weights: Weights) -> None:
        config = self._speculative.draft_model_config
        with set_current_vllm_config(self._worker.vllm_config):
            layerwise_load(self._drafter(), self._policy(), weights, config)

    def _weights_to_serve(self) -> Weights:
        """Of the drafter that serves, without what it shares with the policy."""
        if self._serving is not None:
            return self._serving.tensors.items()
        drafter, names = self._drafter(), self._names()
        loader = get_model_loader(self._worker.load_config)
        weights = loader.get_all_weights(self._speculative.draft_model_config, drafter)
        return ((name, tensor) for name, tensor in weights if not names.is_shared(name))

    @property
    def _method(self) -> str | None:
        return self._speculative.method if self._speculative else None

    def _drafter(self) -> nn.Module:
        if self._method not in METHODS:
            can = ", ".join(METHODS)
            raise EngineError(f"this engine drafts with {self._method}; can swap: {can}")
        drafter: nn.Module = self._worker.model_runner.get_draft_model()
        return drafter

    def _policy(self) -> nn.Module:
        policy: nn.Module = self._worker.model_runner.get_model()
        return policy

    def _names(self) -> Names:
        return Names.of_drafter(self._drafter(), self._policy(), str(self._method))

    def _registry(self) -> Registry:
        if self._settings.registry is None:
            raise EngineError("this engine was started without the setting `registry`")
        return Registry.open(self._settings.registry, self._settings.registry_name)

    def _running_config(self) -> dict[str, Any]:
        """Of the drafter vLLM was started with, the only one whose configuration it has read."""
        config = self._speculative.draft_model_config
        path = Path(config.model) / CONFIG
        if not path.is_file():  # a name on a hub
            return dict(config.hf_config.to_dict())
        layers = self._worker.model_config.hf_text_config.num_hidden_layers
        return with_defaults(read_json(path), path, layers)

    def _started_with(self) -> DrafterVersion:
        """Which of the registry's versions vLLM was started with, if it is one of them."""
        if self._settings.registry is None or not self._speculative:
            return DrafterVersion(None)
        registry, model = self._registry(), Path(self._speculative.model or "")
        for version in registry.versions():
            if registry.folder(version).resolve() == model.resolve():
                return DrafterVersion(version, registry.manifest(version).files[WEIGHTS])
        return DrafterVersion(None)
