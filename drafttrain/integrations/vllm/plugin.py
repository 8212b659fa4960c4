"""Entry point of ``vllm.general_plugins``: what vLLM loads in every one of its processes.

Hooks two methods of ``WorkerWrapperBase`` (vLLM 0.32, ``vllm/v1/worker/worker_base.py``): a plugin
is told neither when a worker has its runner nor when its models are loaded. They can go when vLLM
tells plugins. Without ``additional_config={"drafttrain": ...}`` they do nothing, and no hidden
state, sampler call or weight is looked at; on CPU the sampler's correction is applied regardless,
because without it speculation at a temperature is wrong (see ``cpu_sampler``).

Worker methods are called by name through ``collective_rpc``. Status and swap answer with a dict
that is a message of ``messages``, or a :class:`Refusal` where ``error`` says why not.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from drafttrain.errors import DrafttrainError, EngineError
from drafttrain.integrations.vllm.messages import Refusal
from drafttrain.integrations.vllm.settings import SWITCH_ON, engine_settings

if TYPE_CHECKING:
    from drafttrain.integrations.vllm.worker import EngineSide

_SIDE = "_drafttrain"
_HOOKED = "_drafttrain_hooked"


class NotSwitchedOn(EngineError):
    """The plugin is installed, but this engine was not told to use it."""


def register() -> None:
    """Gives vLLM's workers our methods, hooks and backend; harmless when repeated."""
    from vllm.v1.worker.worker_base import WorkerBase, WorkerWrapperBase

    from drafttrain.integrations.vllm import transfer

    transfer.register()
    for method in (
        drafttrain_status,
        drafttrain_prepare,
        drafttrain_swap,
        drafttrain_policy_version,
        drafttrain_capture,
        drafttrain_flush,
    ):
        setattr(WorkerBase, method.__name__, method)
    if not hasattr(WorkerWrapperBase, _HOOKED):
        _hook(WorkerWrapperBase)
        setattr(WorkerWrapperBase, _HOOKED, True)


def _hook(wrapper_class: Any) -> None:
    init_device, initialize = wrapper_class.init_device, wrapper_class.initialize_from_config

    @wraps(init_device)
    def init_device_then_prepare(self: Any) -> None:
        init_device(self)
        _prepare(self.worker)

    @wraps(initialize)
    def initialize_then_attach(self: Any, kv_cache_configs: list[Any]) -> None:
        initialize(self, kv_cache_configs)
        _attach(self.worker)

    wrapper_class.init_device = init_device_then_prepare
    wrapper_class.initialize_from_config = initialize_then_attach


def _prepare(worker: Any) -> None:
    from drafttrain.integrations.vllm import cpu_sampler

    cpu_sampler.apply()
    settings = engine_settings(worker.vllm_config)
    if settings is not None:
        from drafttrain.integrations.vllm.worker import before_loading

        before_loading(worker, settings)


def _attach(worker: Any) -> None:
    settings = engine_settings(worker.vllm_config)
    if settings is not None and not hasattr(worker, _SIDE):
        from drafttrain.integrations.vllm.worker import EngineSide

        setattr(worker, _SIDE, EngineSide(worker, settings))


def _side(worker: Any) -> EngineSide:
    side: EngineSide | None = getattr(worker, _SIDE, None)
    if side is None:
        raise NotSwitchedOn(f"drafttrain is not switched on in this engine; {SWITCH_ON}")
    return side


def _answer(worker: Any, ask: Callable[[EngineSide], BaseModel]) -> dict[str, Any]:
    try:
        return ask(_side(worker)).model_dump(mode="json")
    except NotSwitchedOn as error:
        return Refusal(error=str(error), status=404).model_dump()
    except DrafttrainError as error:
        return Refusal.of(error).model_dump()


def drafttrain_status(worker: Any) -> dict[str, Any]:
    """An :class:`EngineStatus` as a dict, or a :class:`Refusal` when not switched on."""
    return _answer(worker, lambda side: side.status())


def drafttrain_prepare(worker: Any, version: int) -> dict[str, Any]:
    """Starts to read a version, or says that it is read: a :class:`Prepared` as a dict, or a
    :class:`Refusal`. A swap without it works as well, and reads the version between two steps."""
    return _answer(worker, lambda side: side.prepare(version))


def drafttrain_swap(worker: Any, version: int) -> dict[str, Any]:
    """A :class:`SwapResult` as a dict, or a :class:`Refusal`; the old drafter then serves on."""
    return _answer(worker, lambda side: side.swap(version))


def drafttrain_policy_version(worker: Any, version: int) -> int:
    """Names the policy's weights as they are now: call it after an update, not before.

    Raises:
        EngineError: the version would go back.
    """
    policy = _side(worker).versions.policy
    policy.set(version)
    return policy.number


def drafttrain_capture(worker: Any, enabled: bool) -> None:
    """Switches the tap's capturing on or off.

    Raises:
        EngineError: it cannot be switched on here.
    """
    _side(worker).capture(enabled)


def drafttrain_flush(worker: Any) -> bool:
    """Waits until every finished rollout is in the spool."""
    return _side(worker).flush()
