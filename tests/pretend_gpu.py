"""A device of make-believe, for what a machine without a GPU can show: where tensors lie.

Tensors "on" it are computed with on the CPU, but say that they are elsewhere. As with a real GPU,
an operation on tensors of both devices fails, unless CUDA, too, allows it: copies between them, CPU
scalars, and CPU indices. Nothing is shown of kernels, speed or memory, and torch does not take it
for CUDA.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import (
    _DummyBackendModule,
    _setup_privateuseone_for_python_backend,
)

DEVICE, CPU = torch.device("privateuseone", 0), torch.device("cpu")
_aten = torch.ops.aten
_ARANGES = ("arange", "arange.start", "arange.start_step")
_EMPTY = torch.library.Library("aten", "IMPL")
_AUTOCAST = torch.library.Library("_", "IMPL", "AutocastPrivateUse1")
_BETWEEN_DEVICES = (_aten._to_copy, _aten.copy_)
_WITH_CPU_INDICES = (_aten.index, _aten.index_put_, _aten._index_put_impl_)


class Elsewhere(Tensor):
    """Holds its numbers in `inner`, a CPU tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Elsewhere:
        wrapper = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=DEVICE,
        )
        wrapper.inner = inner
        return wrapper

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self) -> Any:
        return self.inner.tolist()


def _run(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    there = any(isinstance(tensor, Elsewhere) for tensor in tensors)
    if func.overloadpacket not in _BETWEEN_DEVICES:
        _check_devices(func, args, tensors, there)
    elif func.overloadpacket is _aten.copy_:
        there = isinstance(args[0], Elsewhere)
    if (device := kwargs.get("device")) is not None:
        there = torch.device(device).type != "cpu"
        kwargs = kwargs | {"device": CPU}
    known = {id(t.inner): t for t in tensors if isinstance(t, Elsewhere)}
    result = func(*_inner(args), **_inner(kwargs))

    def outside(value: Any) -> Any:
        if not isinstance(value, Tensor) or not there:
            return value
        return known[id(value)] if id(value) in known else Elsewhere(value)

    return tree_map(outside, result)


def _check_devices(func: Any, args: tuple[Any, ...], tensors: list[Tensor], there: bool) -> None:
    if func.overloadpacket in _WITH_CPU_INDICES and isinstance(args[0], Elsewhere):
        tensors = [tensor for tensor in tensors if tensor.dtype not in (torch.int64, torch.bool)]
    here = [tensor for tensor in tensors if not isinstance(tensor, Elsewhere) and tensor.ndim]
    if there and here:
        raise RuntimeError(f"{func}: expected all tensors to be on the same device")


def _inner(values: Any) -> Any:
    return tree_map(lambda value: value.inner if isinstance(value, Elsewhere) else value, values)


class _Backend(_DummyBackendModule):  # type: ignore[no-untyped-call,misc]
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def _made(name: str, *args: Any, **kwargs: Any) -> Elsewhere:
    operator, _, overload = name.partition(".")
    make = getattr(getattr(_aten, operator), overload or "default")
    return Elsewhere(make(*args, **kwargs | {"device": CPU}))


def register() -> torch.device:
    """Make the device known to torch, for good: once a process, and in one of its own."""
    _setup_privateuseone_for_python_backend("pretend", _Backend())
    # What everything else that makes a tensor comes down to.
    for name in ("empty.memory_format", "empty_strided", *_ARANGES):
        _EMPTY.impl(name, partial(_made, name), "PrivateUse1")
    # Autocast is on for those who ask; it casts nothing by itself, as CUDA's would.
    _AUTOCAST.fallback(torch.library.fallthrough_kernel)
    return DEVICE
