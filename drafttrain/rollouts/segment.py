"""A spool segment: many rollouts of one engine, policy version and drafter version in one file.

A safetensors file; T tokens of all N rollouts end to end, H hidden size, A aux layers::

    tokens          int32 [T]
    offsets         int64 [N + 1]     rollout i is tokens[offsets[i] : offsets[i + 1]]
    prompt_lengths  int64 [N]
    captured        bool [T]          False: the engine did not compute this row
    last_hidden     [T, H]            in the layout's dtype, like
    aux_hidden      [T, A, H]         absent without aux layers
    generated       bool [T]          absent when all completions were sampled as a whole
    rejected        bool [T]          absent when the engine did not tell where it rejected drafts

with the metadata of every spool file (see files.py) and ``segment``, the JSON of :class:`Header`.
Reading maps the file; a rollout is a view of the map, which outlives the file's deletion.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, overload

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from drafttrain.config import explain
from drafttrain.errors import RolloutError
from drafttrain.rollouts.files import (
    SCHEMA_VERSION,
    Parts,
    check_tensor,
    check_unchanged,
    map_file,
)
from drafttrain.rollouts.record import FeatureLayout, FinishReason, Rollout

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_OPTIONAL_FLAGS = ("generated", "rejected")

Count = Annotated[int, Field(ge=0)]


class RolloutEntry(BaseModel):
    """Of a rollout, what is not a tensor; fields as in :class:`Rollout`."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    rollout_id: str
    group: str
    temperature: Annotated[float, Field(ge=0)]
    finish_reason: FinishReason | None
    rounds: Count
    drafted: Count
    accepted: Count
    reward: float | None
    domain: str | None = None


class Header(BaseModel):
    """Of a segment, what is not a tensor."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    engine: str
    policy_version: Count
    drafter_version: Count | None
    layout: FeatureLayout
    rollouts: list[RolloutEntry] = Field(min_length=1)


@dataclass(frozen=True)
class Segment:
    """A segment that was read and found sound.

    Attributes:
        path: its file, which may be deleted while this is in use.
        schema_version: of the file.
        engine: that wrote it.
        policy_version, drafter_version: of all its rollouts.
        layout: of all its rollouts.
        rollouts: views on the mapped file.
        nbytes: of its tensors.
    """

    path: Path
    schema_version: int
    engine: str
    policy_version: int
    drafter_version: int | None
    layout: FeatureLayout
    rollouts: Sequence[Rollout]
    nbytes: int


def pack(
    rollouts: Sequence[Rollout], layout: FeatureLayout, engine: str, where: str | Path
) -> tuple[dict[str, Parts], dict[str, str]]:
    """Tensors, in parts, and metadata of a segment with these rollouts.

    Raises:
        RolloutError: they are not of one policy and drafter version, or do not fit `layout`;
            blames `where`.
    """
    versions = {(rollout.policy_version, rollout.drafter_version) for rollout in rollouts}
    if len(versions) != 1:
        problem = f"{len(versions)} pairs of policy and drafter version, expected one"
        raise RolloutError(where, "rollouts", problem)
    policy_version, drafter_version = versions.pop()
    try:
        header = Header(
            engine=engine,
            policy_version=policy_version,
            drafter_version=drafter_version,
            layout=layout,
            rollouts=[_entry(rollout) for rollout in rollouts],
        )
    except ValidationError as error:
        raise explain(error, where, RolloutError) from error
    parts = _parts(rollouts, where)
    wholes = {name: _whole(parts[name], name, where) for name in parts}
    _check_tensors(header, wholes, where)
    small = {name: [whole] for name, whole in wholes.items() if not whole.is_meta}
    return parts | small, {"segment": header.model_dump_json()}


def read_segment(path: Path) -> Segment:
    """Map a segment and check everything.

    Raises:
        RolloutError: missing, not whole, of a newer schema, inconsistent or changed; names the
            field.
    """
    tensors, metadata = map_file(path)
    try:
        header = Header.model_validate_json(metadata.get("segment", ""))
    except ValidationError as error:
        raise explain(error, path, RolloutError) from error
    _check_tensors(header, tensors, path)
    check_unchanged(tensors, metadata, path)
    return Segment(
        path=path,
        schema_version=SCHEMA_VERSION,
        engine=header.engine,
        policy_version=header.policy_version,
        drafter_version=header.drafter_version,
        layout=header.layout,
        rollouts=_Views(header, tensors),
        nbytes=sum(tensor.nbytes for tensor in tensors.values()),
    )


class _Views(Sequence[Rollout]):
    """The rollouts of a mapped segment; each is made when it is asked for."""

    def __init__(self, header: Header, tensors: dict[str, Tensor]) -> None:
        self._header = header
        self._tensors = tensors
        self._offsets: list[int] = tensors["offsets"].tolist()
        self._prompt_lengths: list[int] = tensors["prompt_lengths"].tolist()

    def __len__(self) -> int:
        return len(self._header.rollouts)

    @overload
    def __getitem__(self, index: int) -> Rollout: ...
    @overload
    def __getitem__(self, index: slice) -> list[Rollout]: ...
    def __getitem__(self, index: int | slice) -> Rollout | list[Rollout]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        rows = slice(self._offsets[index], self._offsets[index + 1])
        optional: dict[str, Any] = {
            name: self._tensors[name][rows] if name in self._tensors else None
            for name in ("aux_hidden", *_OPTIONAL_FLAGS)
        }
        return Rollout(
            **vars(self._header.rollouts[index]),
            tokens=self._tensors["tokens"][rows],
            prompt_length=self._prompt_lengths[index],
            captured=self._tensors["captured"][rows],
            last_hidden=self._tensors["last_hidden"][rows],
            policy_version=self._header.policy_version,
            drafter_version=self._header.drafter_version,
            **optional,
        )


def _entry(rollout: Rollout) -> RolloutEntry:
    return RolloutEntry(**{name: getattr(rollout, name) for name in RolloutEntry.model_fields})


def _parts(rollouts: Sequence[Rollout], where: str | Path) -> dict[str, Parts]:
    lengths = torch.tensor([0, *(rollout.length for rollout in rollouts)])
    aux = [rollout.aux_hidden for rollout in rollouts if rollout.aux_hidden is not None]
    if aux and len(aux) != len(rollouts):
        raise RolloutError(where, "aux_hidden", "some rollouts have it, some do not")
    for rollout in rollouts:
        rows = [rollout.captured, rollout.last_hidden, rollout.aux_hidden]
        rows += [rollout.generated, rollout.rejected]
        if any(tensor is not None and len(tensor) != rollout.length for tensor in rows):
            problem = f"features or flags do not have its {rollout.length} rows"
            raise RolloutError(where, f"rollout {rollout.rollout_id}", problem)
    parts: dict[str, Parts] = {
        "tokens": [rollout.tokens for rollout in rollouts],
        "offsets": [lengths.cumsum(0)],
        "prompt_lengths": [torch.tensor([rollout.prompt_length for rollout in rollouts])],
        "captured": [rollout.captured for rollout in rollouts],
        "last_hidden": [rollout.last_hidden.contiguous() for rollout in rollouts],
    }
    if any(rollout.generated is not None for rollout in rollouts):
        parts["generated"] = [rollout.sampled_runs > 0 for rollout in rollouts]
    rejected = [rollout.rejected for rollout in rollouts if rollout.rejected is not None]
    if len(rejected) == len(rollouts):
        parts["rejected"] = rejected
    return parts | ({"aux_hidden": [tensor.contiguous() for tensor in aux]} if aux else {})


def _whole(parts: Parts, name: str, where: str | Path) -> Tensor:
    """The tensor the parts make; of hidden states, which are not checked, only its shape."""
    kinds = {(tuple(part.shape[1:]), part.dtype) for part in parts}
    if len(kinds) != 1:
        raise RolloutError(where, name, "differs in shape or dtype between rollouts")
    if not name.endswith("_hidden"):
        return torch.cat(list(parts))
    ((shape, dtype),) = kinds
    return torch.empty((sum(map(len, parts)), *shape), dtype=dtype, device="meta")


def _check_tensors(header: Header, tensors: dict[str, Tensor], where: str | Path) -> None:
    layout, count = header.layout, len(header.rollouts)
    if layout.dtype not in DTYPES:
        raise RolloutError(where, "dtype", f"{layout.dtype!r:.40}, expected one of {list(DTYPES)}")
    total = len(tensors["tokens"]) if "tokens" in tensors and tensors["tokens"].ndim else 0
    dtype, hidden = DTYPES[layout.dtype], layout.hidden_size
    expected: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
        "tokens": ((total,), torch.int32),
        "offsets": ((count + 1,), torch.int64),
        "prompt_lengths": ((count,), torch.int64),
        "captured": ((total,), torch.bool),
        "last_hidden": ((total, hidden), dtype),
    }
    if layout.layer_ids:
        expected["aux_hidden"] = ((total, len(layout.layer_ids), hidden), dtype)
    for name in _OPTIONAL_FLAGS:
        if name in tensors:
            expected[name] = ((total,), torch.bool)
    for name, (shape, kind) in expected.items():
        check_tensor(tensors, name, shape, [kind], where)
    unknown = sorted(tensors.keys() - expected.keys())
    if unknown:
        raise RolloutError(where, unknown[0], "unknown tensor, or not one of this layout")
    _check_values(tensors, where)


def _check_values(tensors: dict[str, Tensor], where: str | Path) -> None:
    tokens, offsets = tensors["tokens"], tensors["offsets"]
    if offsets[0] != 0 or offsets[-1] != len(tokens) or bool((offsets[1:] <= offsets[:-1]).any()):
        problem = f"expected to rise from 0 to {len(tokens)}, the number of tokens"
        raise RolloutError(where, "offsets", problem)
    prompts, lengths = tensors["prompt_lengths"], offsets.diff()
    if bool(((prompts < 0) | (prompts > lengths)).any()):
        raise RolloutError(where, "prompt_lengths", "expected 0 to the rollout's length")
    if bool((tokens < 0).any()):
        raise RolloutError(where, "tokens", "negative token ids")
    # A byte that is neither 0 nor 1 is no boolean, and torch would not notice.
    for name in ("captured", *_OPTIONAL_FLAGS):
        if name in tensors and bool((tensors[name].view(torch.uint8) > 1).any()):
            raise RolloutError(where, name, "expected 0 or 1 for every row")
