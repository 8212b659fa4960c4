"""Checkpoint tensors into a live module, into the storage it has.

By vLLM 0.32's layerwise reload (``vllm/model_executor/model_loader/reload``), which keeps every
tensor's storage, so that CUDA graphs stay valid. Between its start and its end the module is on
``meta``, and no engine step may run. vLLM does not check completeness.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import (
    UnquantizedFusedMoEMethod,
)
from vllm.model_executor.layers.rotary_embedding import _ROPE_DICT
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.mtp_validation import disable_mtp_completeness_check
from vllm.model_executor.model_loader.reload.layerwise import (
    finalize_layerwise_reload,
    get_layerwise_info,
    initialize_layerwise_reload,
    is_deferred_attention_layer,
)
from vllm.platforms import current_platform

from drafttrain.errors import EngineError

Weights = Iterable[tuple[str, Tensor]]


def layerwise_load(model: Any, policy: nn.Module, weights: Weights, model_config: Any) -> None:
    """Loads checkpoint tensors into a live module, into the storage it has.

    Args:
        model: the drafter.
        policy: its modules in the drafter are left alone.
        weights: of all other modules that have any.
        model_config: the drafter's.

    Whatever is raised, the module is whole again, but some of its layers are new and some old.
    """
    with (
        torch.no_grad(),
        _without_shared(model, policy),
        _packing_experts(model),
        disable_mtp_completeness_check(),
    ):
        initialize_layerwise_reload(model)
        whole = False
        try:
            model.load_weights(weights)
            _check_whole(model)
            whole = True
        finally:
            if not whole:
                _forget_half_loaded(model)
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


@contextmanager
def _packing_experts(model: nn.Module) -> Iterator[None]:
    """Has experts packed for a CPU's kernel, which vLLM does with the first weights alone.

    Where a kernel is there already, ``UnquantizedFusedMoEMethod._setup_kernel`` takes weights for
    an update and leaves them as they came, and the kernel reads them as packed.
    """
    layers = model.modules() if current_platform.is_cpu() else ()
    methods = [getattr(layer, "quant_method", None) for layer in layers]
    kernels = [
        (method, method.moe_kernel)
        for method in methods
        if isinstance(method, UnquantizedFusedMoEMethod)
    ]
    for method, _ in kernels:
        method.moe_kernel = None
    try:
        yield
    finally:
        for method, kernel in kernels:
            method.moe_kernel = kernel


def _check_whole(model: nn.Module) -> None:
    """Every layer has got all its values; what vLLM pads, it has got as far as it goes.

    Raises:
        EngineError: names a layer that has not.
    """
    for name, layer in model.named_modules():
        info = get_layerwise_info(layer)
        if not info.can_load() or is_deferred_attention_layer(layer):
            continue
        padded = isinstance(layer, VocabParallelEmbedding) and info.load_numel > 0
        expected = info.load_numel_total - _constants(layer)
        if not padded and info.load_numel < expected:
            raise EngineError(f"{name}: only {info.load_numel} of {expected} values came")


def _constants(layer: nn.Module) -> int:
    """How many of its values no checkpoint has: a transformers module's frequencies, say."""
    computed = get_layerwise_info(layer).kernel_non_persistent_buffers
    buffers = layer.named_buffers(recurse=False)
    return sum(buffer.numel() for name, buffer in buffers if name in computed)


def _forget_half_loaded(model: nn.Module) -> None:
    # Otherwise finalize would process layers of which it has one part, or a tensor it choked on.
    for layer in model.modules():
        info = get_layerwise_info(layer)
        if info.can_load():
            info.loaded_weights.clear()
            info.load_numel = 0
