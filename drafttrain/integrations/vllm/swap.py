"""A registry version into the running drafter, or, when that fails, the old one back.

Uses vLLM 0.32's layerwise reload (``vllm/model_executor/model_loader/reload``), which keeps every
tensor's storage, so CUDA graphs stay valid. Between its start and its end the drafter is on
``meta``: all of it happens in one worker call, between two engine steps. vLLM neither checks
completeness nor can go back, hence the checks before and the restore after.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
)

from drafttrain.checkpoints.formats import with_defaults
from drafttrain.checkpoints.manifest import TargetFingerprint, read_json
from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import CONFIG, WEIGHTS, Verified, sha256_of, verify
from drafttrain.errors import CheckpointError, EngineError
from drafttrain.integrations.vllm.fit import aliased, check_config, check_tensors, live_name
from drafttrain.integrations.vllm.messages import SwapResult
from drafttrain.integrations.vllm.settings import EngineSettings
from drafttrain.integrations.vllm.versions import DrafterVersion, Versions

Weights = Iterable[tuple[str, Tensor]]

# A new method needs its names in ``fit`` and a round-trip test.
METHODS = ("eagle3",)


@dataclass(frozen=True)
class _Checkpoint:
    where: str
    verified: Verified
    sha: str


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
        versions.drafter = self._started_with()

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
        """Makes a registry version the drafter.

        Raises:
            CheckpointError: unknown, damaged or unfitting version; the old drafter serves on.
            EngineError: no registry or no drafter here, or loading failed; says what serves now.
        """
        started = time.perf_counter()
        drafter, policy = self._drafter(), self._worker.model_runner.get_model()
        new = self._read_by_now(version)
        tp = self._worker.parallel_config.tensor_parallel_size
        check_tensors(new.where, new.verified.tensors, drafter, policy, tp=tp)
        before = self._versions.drafter
        self._load_or_restore(
            new.verified, drafter, policy, f"loading drafter version {version} failed"
        )
        self._prepared.clear()
        self._serving = new.verified
        self._versions.drafter = DrafterVersion(version, new.sha)
        self._versions.swaps += 1
        return SwapResult(
            version=version,
            previous=before.number,
            seconds=time.perf_counter() - started,
            sha=new.sha,
        )

    def _reading(self, version: int) -> Future[_Checkpoint]:
        self._drafter()
        if version not in self._prepared:
            folder = self._registry().folder(version)
            self._prepared[version] = self._reader.submit(self._read, folder)
        return self._prepared[version]

    def _read_by_now(self, version: int) -> _Checkpoint:
        try:
            return self._reading(version).result()
        except CheckpointError:
            self._prepared.pop(version, None)  # it may be mended
            raise

    def _read(self, folder: Path) -> _Checkpoint:
        """In the reader's thread."""
        target = TargetFingerprint.from_config(self._worker.model_config.hf_config.to_dict())
        verified = verify(folder, target)
        check_config(str(folder), verified.config, self._running_config())
        manifest = verified.manifest
        sha = manifest.files[WEIGHTS] if manifest else sha256_of(folder / WEIGHTS)
        return _Checkpoint(str(folder), verified, sha)

    def _load_or_restore(
        self, new: Verified, drafter: nn.Module, policy: nn.Module, failure: str
    ) -> None:
        before = self._versions.drafter
        config = self._speculative.draft_model_config
        with set_current_vllm_config(self._worker.vllm_config):
            try:
                layerwise_load(drafter, policy, new.tensors.items(), config)
            except Exception as error:
                self._versions.drafter = DrafterVersion(None)  # should the restore fail as well
                layerwise_load(drafter, policy, self._old_weights(drafter, policy), config)
                self._versions.drafter = before
                raise EngineError(f"{failure}: {error}; {before} is restored") from error

    def _old_weights(self, drafter: nn.Module, policy: nn.Module) -> Weights:
        """Of the drafter that served, without what it shares with the policy."""
        if self._serving is not None:
            return self._serving.tensors.items()
        loader = get_model_loader(self._worker.load_config)
        weights = loader.get_all_weights(self._speculative.draft_model_config, drafter)
        shared = aliased(drafter, policy)
        return ((name, tensor) for name, tensor in weights if live_name(name) not in shared)

    def _drafter(self) -> nn.Module:
        method = self._speculative.method if self._speculative else None
        if method not in METHODS:
            raise EngineError(f"this engine drafts with {method}; can swap: {', '.join(METHODS)}")
        drafter: nn.Module = self._worker.model_runner.get_draft_model()
        return drafter

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
        return with_defaults(read_json(path), path)

    def _started_with(self) -> DrafterVersion:
        """Which of the registry's versions vLLM was started with, if it is one of them."""
        if self._settings.registry is None or not self._speculative:
            return DrafterVersion(None)
        registry, model = self._registry(), Path(self._speculative.model or "")
        for version in registry.versions():
            if registry.folder(version).resolve() == model.resolve():
                return DrafterVersion(version, registry.manifest(version).files[WEIGHTS])
        return DrafterVersion(None)


def layerwise_load(model: Any, policy: nn.Module, weights: Weights, model_config: Any) -> None:
    """Loads checkpoint tensors into a live module, into the storage it has.

    Args:
        model: the drafter.
        policy: its modules in the drafter are left alone.
        weights: of all other modules that have any.
        model_config: the drafter's.

    Whatever is raised, the module is whole again, but some of its layers are new and some old.
    """
    with torch.no_grad(), _without_shared(model, policy):
        initialize_layerwise_reload(model)
        try:
            model.load_weights(weights)
        except BaseException:
            _forget_half_loaded(model)
            raise
        finally:
            finalize_layerwise_reload(model, model_config)


@contextmanager
def _without_shared(model: nn.Module, policy: nn.Module) -> Iterator[None]:
    """Takes out of the drafter what is not its own, so that a reload cannot reach it.

    That is the policy's embedding and output head, and rotary embeddings, of which vLLM keeps one
    for all models in a process that want the same: on ``meta``, another engine's step would fail.
    """
    shared = {id(module) for module in (*policy.modules(), *_ROPE_DICT.values())}
    taken = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if id(child) in shared
    ]
    for parent, name, _ in taken:
        parent._modules[name] = None
    try:
        yield
    finally:
        for parent, name, child in taken:
            parent._modules[name] = child


def _forget_half_loaded(model: nn.Module) -> None:
    # Otherwise finalize would process layers of which it has one part, or a tensor it choked on.
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0


def keep_own_head(proposer: Any) -> None:
    """Lets an eagle3 drafter that ships an ``lm_head`` keep it; call before models are loaded.

    vLLM 0.32 (``llm_base_proposer.py``, ``_maybe_share_lm_head``) replaces it by the policy's when
    the two are equal, as in a drafter initialised from its policy: no trained head could then ever
    be loaded without overwriting the policy's. The method is called with a policy that has no head
    to share; it can go when sharing becomes an option.
    """
    share: Callable[[Any], None] = proposer._maybe_share_lm_head

    def share_only_if_absent(target: Any) -> None:
        own = getattr(proposer.model, "has_own_lm_head", False)
        share(SimpleNamespace(model=target.model) if own else target)

    proposer._maybe_share_lm_head = share_only_if_absent
