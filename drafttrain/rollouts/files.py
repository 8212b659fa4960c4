"""A file of the spool: tensors in safetensors, with a checksum over everything that it says.

Its metadata has ``schema_version`` and ``checksum``, the CRC-32 of the other metadata and of every
tensor; the rest is its writer's.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.errors import RolloutError
from drafttrain.tensorfile import map_tensors

SCHEMA_VERSION = 1
_CHECKSUM = "checksum"

# A segment's header names each of its rollouts; far above what 65,536 tokens of them need.
_HEADER_LIMIT = 64 << 20


# A tensor, in parts that follow each other along the first dimension.
Parts = Sequence[Tensor]

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.bool: "BOOL",
}


def save(path: Path, tensors: Mapping[str, Parts], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with a checksum.

    Parts are written from where they lie, without holding Python's lock: an engine's thread goes on
    meanwhile, and there is no second copy of the hidden states.

    Args:
        path: of the file.
        tensors: contiguous, on the CPU; every part of one has its dtype and its other dimensions.
        metadata: what the writer wants to say.

    Raises:
        OSError: it cannot be written.
    """
    about = {"schema_version": str(SCHEMA_VERSION), **metadata}
    # Widest first, so that every tensor is aligned.
    names = sorted(tensors, key=lambda name: (-tensors[name][0].dtype.itemsize, name))
    header: dict[str, Any] = {"__metadata__": {_CHECKSUM: _checksum(tensors, about)} | about}
    end = 0
    for name in names:
        start, end = end, end + sum(part.nbytes for part in tensors[name])
        dtype, shape = _kind(tensors[name])
        header[name] = {"dtype": _DTYPES[dtype], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name in names:
            for part in tensors[name]:
                file.write(_bytes(part))


def map_file(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Map a file: its tensors and its metadata; :func:`check_unchanged` is left to the caller.

    Raises:
        RolloutError: missing, not a whole safetensors file, or not of this schema.
    """
    tensors, metadata = map_tensors(path, RolloutError, max_header=_HEADER_LIMIT)
    found = metadata.get("schema_version", "")
    if found != str(SCHEMA_VERSION):
        newer = found.isdecimal() and len(found) < 10 and int(found) > SCHEMA_VERSION
        advice = "; written by a newer drafttrain" if newer else ""
        problem = f"{found!r:.40}, expected '{SCHEMA_VERSION}'{advice}"
        raise RolloutError(path, "schema_version", problem)
    return tensors, metadata


def check_unchanged(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], where: str | Path
) -> None:
    """Hold a mapped file against its checksum; reads all of it.

    Raises:
        RolloutError: it is not what was written.
    """
    rest = {name: value for name, value in metadata.items() if name != _CHECKSUM}
    parts = {name: [tensor] for name, tensor in tensors.items()}
    if metadata.get(_CHECKSUM) != _checksum(parts, rest):
        raise RolloutError(where, _CHECKSUM, "is not that of the content; the file is damaged")


def check_tensor(
    tensors: dict[str, Tensor],
    name: str,
    shape: tuple[int, ...],
    dtypes: Sequence[torch.dtype],
    where: str | Path,
) -> None:
    """Hold one tensor against its shape and dtype.

    Raises:
        RolloutError: it is missing or has another shape or dtype.
    """
    if name not in tensors:
        raise RolloutError(where, name, "missing")
    found = tensors[name]
    if tuple(found.shape) != shape:
        raise RolloutError(where, name, f"shape {list(found.shape)}, expected {list(shape)}")
    if found.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise RolloutError(where, name, f"{found.dtype}, expected {expected}")


def _checksum(tensors: Mapping[str, Parts], metadata: Mapping[str, str]) -> str:
    kinds = [(name, *map(str, _kind(parts))) for name, parts in sorted(tensors.items())]
    found = zlib.crc32(json.dumps([sorted(metadata.items()), kinds]).encode())
    for _, parts in sorted(tensors.items()):
        for part in parts:
            found = zlib.crc32(_bytes(part), found)
    return f"{found:08x}"


def _kind(parts: Parts) -> tuple[torch.dtype, list[int]]:
    """Dtype and shape of the whole."""
    first = parts[0]
    length = [sum(map(len, parts))] if first.ndim else []
    return first.dtype, [*length, *first.shape[1:]]


def _bytes(part: Tensor) -> memoryview:
    content: memoryview = part.detach().flatten().view(torch.uint8).numpy().data
    return content
