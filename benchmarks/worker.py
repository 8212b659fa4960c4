"""A process of its own for each contender, so that its time and its memory are its own.

The parent asks for one step at a time and so interleaves contenders; an idle one costs nothing but
the memory of its model. Memory is the peak resident size during a step minus the resident size just
before it: model, optimizer state and data are already there. On a GPU it is what torch allocated.
"""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import resource
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self

import torch

from benchmarks.peers import Variant, load
from benchmarks.workload import DEVICE, Cell, make_workload

MEMORY_LIMIT, MEMORY_LIMIT_APART = 12 << 30, 20 << 30
"""A process that needs more is refused the allocation and fails; on a GPU, which has its own."""

_OUT_OF_MEMORY = ("allocate memory", "bad_alloc", "CUDA out of memory")


class TooLarge(Exception):
    """The step does not fit the memory limit."""


@dataclass(frozen=True)
class Timing:
    """One step: wall seconds, and bytes above the resident ones when they were asked for."""

    seconds: float
    peak_bytes: int = 0


class Worker:
    """The parent's end: a started process that holds one contender."""

    def __init__(self, name: str, cell: Cell, variant: Variant) -> None:
        self.name, self.variant = name, variant
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, name, cell, variant))
        self._process.start()
        theirs.close()

    def wait(self) -> Self:
        """Until it is built; processes started together build together.

        Raises:
            RuntimeError: it ended instead; why is printed on stderr.
        """
        self._receive()
        return self

    def step(self, memory: bool = False) -> Timing:
        """Let it take one step.

        Raises:
            TooLarge: it ran out of memory; the process is of no use any more.
            RuntimeError: it ended for another reason, printed on stderr.
        """
        self._connection.send(memory)
        answer = self._receive()
        if isinstance(answer, TooLarge):
            raise answer
        assert isinstance(answer, Timing)
        return answer

    def _receive(self) -> object:
        try:
            return self._connection.recv()
        except EOFError as error:
            raise RuntimeError(f"{self.name} ({self.variant}) ended; see stderr") from error

    def close(self) -> None:
        """End the process; it notices that nobody asks any more."""
        self._connection.close()
        self._process.join()


def _serve(connection: Connection, name: str, cell: Cell, variant: Variant) -> None:
    os.dup2(2, 1)  # stdout is the parent's, for JSON
    warnings.simplefilter("ignore")
    if DEVICE.type == "cpu":
        limit = MEMORY_LIMIT_APART if cell.apart else MEMORY_LIMIT
        resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    contender = load(name)(make_workload(cell, variant.precision), variant)
    connection.send("ready")
    while True:
        try:
            memory = connection.recv()
        except EOFError:
            return
        try:
            before = _settle() if memory else 0
            start = time.perf_counter()
            contender.step()
            if DEVICE.type == "cuda":
                torch.cuda.synchronize()
            seconds = time.perf_counter() - start
            connection.send(Timing(seconds, _peak() - before if memory else 0))
        except (RuntimeError, MemoryError) as error:
            if not any(sign in str(error) for sign in _OUT_OF_MEMORY):
                raise
            connection.send(TooLarge(str(error)))


def _settle() -> int:
    """Give free memory back, start a new peak (proc(5), clear_refs) and return resident bytes."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak() -> int:
    return torch.cuda.max_memory_allocated() if DEVICE.type == "cuda" else _status("VmHWM")


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) << 10
    raise ValueError(f"/proc/self/status has no {field}")
