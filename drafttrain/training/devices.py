"""One process or many: who holds the drafter's weights, and how gradients become one sum.

Started plainly there is one process and nothing here communicates. Under ``accelerate launch`` (or
``torchrun``) each process trains on its share of a step's microbatches, and either

- every process holds all weights and gradients are added up once a step (DDP), or
- weights, gradients and optimizer state are divided among the processes (FSDP2, ``fully_shard``).

A drafter is used through :meth:`Drafter.unroll`, and its head by the loss, not through one
``forward``: DistributedDataParallel's hooks do not fit, and one sum a step is all it would do.
"""

from __future__ import annotations

import copy
import ctypes
from collections.abc import Iterable

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from drafttrain.config import Precision
from drafttrain.drafters.contract import Drafter

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3


class Devices:
    """The processes that train one drafter together.

    Attributes:
        device: this process's.
        rank: of this process; 0 writes files.
        count: of processes.
        sharded: whether the weights are divided among them.
    """

    def __init__(self, *, sharded: bool = False) -> None:
        """Join the other processes, when there are any; on a GPU when there is one."""
        self._accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.device: torch.device = self._accelerator.device
        if self.device.type == "cpu":
            keep_freed_memory()
        else:
            # In TF32: float32, which estimates are computed in, would else bypass its fast units.
            torch.set_float32_matmul_precision("high")
        self.rank: int = self._accelerator.process_index
        self.count: int = self._accelerator.num_processes
        self.sharded = sharded and self.count > 1

    def place(self, drafter: Drafter) -> Drafter:
        """Move a drafter here, and divide it when that was asked for; in place."""
        drafter.to(self.device)
        if self.sharded:
            from torch.distributed.device_mesh import init_device_mesh
            from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

            mesh = init_device_mesh(self.device.type, (self.count,))
            module = fully_shard(drafter, mesh=mesh)
            register_fsdp_forward_method(drafter, "unroll")
            # The trainer divides by the rows of all processes; gloo knows no scaled sum.
            module.set_force_sum_reduction_for_comms(True)
            module.set_gradient_divide_factor(1.0)
        return drafter

    def total(self, value: Tensor) -> Tensor:
        """The sum over all processes."""
        if self.count == 1:
            return value
        summed: Tensor = self._accelerator.reduce(value.to(self.device), "sum")
        return summed

    def add_gradients(self, parameters: Iterable[torch.nn.Parameter]) -> None:
        """Make every gradient the sum over all processes; FSDP has done it in backward."""
        if self.count == 1 or self.sharded:
            return
        for parameter in parameters:
            if not parameter.requires_grad:
                continue
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def wait(self) -> None:
        """Until every process is here."""
        self._accelerator.wait_for_everyone()


def computed_in(precision: Precision, device: torch.device) -> torch.dtype:
    """What ``training.precision`` means there."""
    if precision == "auto":
        return torch.float32 if device.type == "cpu" else torch.bfloat16
    return torch.float32 if precision == "float32" else torch.bfloat16


def whole(tensor: Tensor) -> Tensor:
    """A tensor that may be divided among processes, all of it; every process must ask."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def divided_as(reference: Tensor, tensor: Tensor) -> Tensor:
    """`tensor`, known whole to every process, divided like `reference`."""
    if not isinstance(reference, DTensor):
        return tensor
    return distribute_tensor(
        tensor.to(reference.device), reference.device_mesh, reference.placements
    )


def whole_copy(drafter: Drafter, plain: Drafter) -> Drafter:
    """A copy of `plain` with the weights of `drafter`; every process must ask."""
    weights = {name: whole(tensor) for name, tensor in drafter.state_dict().items()}
    gathered = copy.deepcopy(plain)
    gathered.load_state_dict(weights)
    return gathered


def keep_freed_memory() -> None:
    """Let this process's malloc keep what is freed, as the allocator for a GPU does.

    By default glibc returns large blocks to the operating system, and every step pays for having
    them mapped and zeroed again: a fifth of a step over a vocabulary of 32,768. Other C libraries
    are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_TRIM_THRESHOLD, -1)
        mallopt(_M_MMAP_THRESHOLD, 1 << 30)
