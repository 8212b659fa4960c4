"""Bytes of any file, and of a safetensors file in particular."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable

BytesDamage = Callable[[bytes, random.Random], bytes]


def flip_a_bit(content: bytes, rng: random.Random) -> bytes:
    index = rng.randrange(len(content))
    flipped = content[index] ^ (1 << rng.randrange(8))
    return content[:index] + bytes([flipped]) + content[index + 1 :]


def flip_in_header(content: bytes, rng: random.Random) -> bytes:
    end = min(len(content), 1200)
    return flip_a_bit(content[:end], rng) + content[end:]


def truncate(content: bytes, rng: random.Random) -> bytes:
    # A trailing line end of JSON is nothing lost.
    return content[: rng.randrange(len(content) - 2)]


def append(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 64))


def zero_a_block(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(max(1, len(content) - 64))
    return content[:start] + b"\1" * 64 + content[start + 64 :]


def shuffle_blocks(content: bytes, rng: random.Random) -> bytes:
    middle = rng.randrange(len(content) // 4, len(content) // 2)
    return content[middle:] + content[:middle]


def claim_a_huge_header(content: bytes, rng: random.Random) -> bytes:
    length = rng.choice([1 << 62, 2**64 - 1, 101_000_000, 90_000_000, len(content) + 1])
    return struct.pack("<Q", length) + content[8:]


def many_tensors(content: bytes, rng: random.Random) -> bytes:
    """A header of several megabytes of empty tensors: small on disk, large in memory."""
    entry = {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}
    header = json.dumps({f"t{i}": entry for i in range(80_000 + rng.randrange(1000))}).encode()
    return struct.pack("<Q", len(header)) + header


def overlapping_tensors(content: bytes, rng: random.Random) -> bytes:
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    first, second = rng.sample(names, 2)
    header[first]["data_offsets"] = header[second]["data_offsets"]
    encoded = json.dumps(header).encode()
    return struct.pack("<Q", len(encoded)) + encoded + content[8 + length :]


def empty(content: bytes, rng: random.Random) -> bytes:
    return b""


def not_the_format(content: bytes, rng: random.Random) -> bytes:
    return rng.choice([b"\x80\x04", b"PK\x03\x04", b"\0" * 100, b"{" * 1000, b"[" * 100_000])


BYTES: list[BytesDamage] = [
    flip_a_bit, flip_in_header, truncate, append, zero_a_block, shuffle_blocks,
    claim_a_huge_header, many_tensors, overlapping_tensors, empty, not_the_format,
]  # fmt: skip
OF_ANY_FILE = (flip_a_bit, truncate, append, zero_a_block, shuffle_blocks, empty, not_the_format)
