"""A weight-transfer backend whose draft updates may name a registry version.

For RL jobs that drive their engines with vLLM's own calls (vLLM 0.32,
``vllm/distributed/weight_transfer``)::

    weight_transfer_config={"backend": "drafttrain+nccl"}      or "drafttrain" alone
    llm.start_draft_weight_update()
    llm.update_weights({"update_info": {"drafter_version": 7}})
    llm.finish_weight_update()

An engine has one backend, and the policy needs it: so this one stands in front of another, whose
name follows the plus sign, and hands it everything else, other draft updates included. A version is
read and verified inside ``update_weights``; the control routes read it before, in a thread.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from vllm.distributed.weight_transfer.base import WeightTransferEngine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

from drafttrain.errors import EngineError

NAME = "drafttrain"
_KEY = "drafter_version"


class NamedDrafterTransfer(WeightTransferEngine[Any, Any]):
    """See the module.

    Attributes:
        swap: makes a registry version the drafter; set by the engine side once it is there.
    """

    def __init__(self, config: Any, vllm_config: Any, device: Any, model: Any) -> None:
        super().__init__(config, vllm_config, device, model)
        self.swap: Callable[[int], object] | None = None
        self._behind: WeightTransferEngine[Any, Any] | None = None
        self._behind_started = False
        behind = config.backend.removeprefix(NAME).removeprefix("+")
        if behind:
            self._behind = WeightTransferEngineFactory.create_engine(
                replace(config, backend=behind), vllm_config, device, model
            )
            self.defers_processing = self._behind.defers_processing

    def set_weight_update_target(self, model: Any, model_config: Any) -> None:
        """The drafter: an update of it has begun."""
        super().set_weight_update_target(model, model_config)
        if self._behind is not None:
            self._behind.set_weight_update_target(model, model_config)

    def reset_weight_update_target(self) -> None:
        """The policy again, as at first."""
        super().reset_weight_update_target()
        if self._behind is not None:
            self._behind.reset_weight_update_target()

    def parse_init_info(self, init_dict: dict[str, Any]) -> Any:
        """As the backend behind has it."""
        return self._required().parse_init_info(init_dict)

    def init_transfer_engine(self, init_info: Any) -> None:
        """Of the backend behind."""
        self._required().init_transfer_engine(init_info)

    def start_weight_update(self) -> None:
        """Begins an update; of the drafter only when its first part has come, and is no version."""
        self._behind_started = False
        if not self._of_drafter:
            self._start_behind()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """Loads a part, or the version that it names.

        Raises:
            EngineError: the version is refused, or drafttrain is not switched on.
        """
        if self._of_drafter and _KEY in update_info:
            self._swap_to(update_info)
            return
        if not self._behind_started:
            self._start_behind()
        self._required().update_weights(update_info)

    def receive_weights(self, update_info: Any) -> None:
        """Of the backend behind."""
        self._required().receive_weights(update_info)

    def finish_weight_update(self) -> None:
        """Ends the update that was begun."""
        if self._behind_started:
            self._required().finish_weight_update()
        self._behind_started = False

    def drain_pending(self) -> None:
        """Of the backend behind."""
        if self._behind is not None:
            self._behind.drain_pending()

    def shutdown(self) -> None:
        """Of the backend behind."""
        if self._behind is not None:
            self._behind.shutdown()

    @property
    def _of_drafter(self) -> bool:
        return self.model is not self._default_model

    def _start_behind(self) -> None:
        self._required().start_weight_update()
        self._behind_started = True

    def _swap_to(self, update_info: dict[str, Any]) -> None:
        version = update_info[_KEY]
        if type(version) is not int or update_info.keys() != {_KEY}:
            raise EngineError(f'expected {{"{_KEY}": N}} and nothing else')
        if self.swap is None:
            raise EngineError("drafttrain is not switched on in this engine")
        self.swap(version)

    def _required(self) -> WeightTransferEngine[Any, Any]:
        if self._behind is None:
            problem = f'only {_KEY} can be updated; name a backend behind it, such as "{NAME}+nccl"'
            raise EngineError(problem)
        return self._behind


def register() -> None:
    """Gives vLLM the backend, alone and in front of each that it has; harmless when repeated."""
    registry = WeightTransferEngineFactory._registry
    fronts = [NAME, *(f"{NAME}+{name}" for name in registry if not name.startswith(NAME))]
    for name in fronts:
        if name not in registry:
            WeightTransferEngineFactory.register_engine(name, NamedDrafterTransfer)
