"""Everything about a drafter folder that can be checked before an engine touches its weights.

An engine checks almost nothing itself: a tensor that is missing or half a fused group stays
uninitialised, and it has no way back. So whatever enters a registry or an engine passes
:func:`verify` first.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from drafttrain.checkpoints.formats import (
    LAYER,
    LAYER_ALIAS,
    aux_layer_ids,
    expected_tensors,
    kind_of,
    with_defaults,
)
from drafttrain.checkpoints.manifest import (
    FILE_NAME,
    JSON_LIMIT,
    Manifest,
    TargetFingerprint,
    read_json,
)
from drafttrain.checkpoints.mtp_format import tells_layers
from drafttrain.errors import CheckpointError
from drafttrain.tensorfile import check_regular, map_tensors

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
FILES = (CONFIG, WEIGHTS)

# Far above any real drafter's; a longer one is not read.
_HEADER_LIMIT = 4 << 20

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
# The engine widens ``d2t`` and passes ``t2d`` over, so other projects write what they like.
_INTEGERS = (torch.int64, torch.int32)
_DTYPES = {"d2t": _INTEGERS, "t2d": (torch.bool, *_INTEGERS, torch.int8, torch.uint8)}


@dataclass(frozen=True)
class Verified:
    """A drafter folder that passed.

    Attributes:
        config: ``config.json``, with the engine's defaults for absent keys filled in.
        tensors: as named in the file; CPU, mapped from it, not copied.
        manifest: None when the folder has none (made elsewhere).
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    manifest: Manifest | None


def verify(folder: str | Path, target: TargetFingerprint | None = None) -> Verified:
    """Read a drafter folder and check hashes, names, shapes, dtypes, values and fit.

    Args:
        folder: with ``config.json`` and ``model.safetensors``; ``manifest.json`` when from a
            registry. Made elsewhere, its weights may be divided among several files.
        target: the policy it must fit; without it only what the folder says itself is checked.

    Raises:
        CheckpointError: names the file and the field at fault.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(folder, "folder", "missing; expected a drafter folder")
    manifest = Manifest.read(folder) if (folder / FILE_NAME).exists() else None
    if manifest is not None:
        _check_listed(folder, manifest)
        _check_hash(folder / CONFIG, manifest, JSON_LIMIT)
    layers = None if target is None else target.num_hidden_layers
    config = with_defaults(read_json(folder / CONFIG), folder / CONFIG, layers)
    if target is not None:
        _check_target(folder, config, target, manifest)
    if manifest is not None:
        _check_hash(folder / WEIGHTS, manifest, _size_limit(config))
    tensors = read_tensors(folder / WEIGHTS) if manifest is not None else _all_tensors(folder)
    _check_tensors(folder / WEIGHTS, config, tensors)
    _check_draft_vocabulary(folder / WEIGHTS, config, tensors)
    if manifest is not None:
        _check_manifest(folder, manifest, config, tensors)
    return Verified(config, tensors, manifest)


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(path, "file", f"cannot be read: {error.strerror}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file.

    Raises:
        CheckpointError: missing, unreadable, or not a whole safetensors file.
    """
    return map_tensors(path, CheckpointError, max_header=_HEADER_LIMIT)[0]


def _all_tensors(folder: Path) -> dict[str, Tensor]:
    """Of a folder made elsewhere: of its one file of the usual name, or of all there are.

    Raises:
        CheckpointError: there are none, one cannot be read, or two hold the same tensor.
    """
    usual = folder / WEIGHTS
    files = [usual] if usual.exists() else sorted(folder.glob("*.safetensors"))
    if not files and (pickles := sorted(folder.glob("*.bin"))):
        problem = f"missing; {pickles[0].name} is a pickle, which is never read: convert it first"
        raise CheckpointError(usual, "file", problem)
    tensors: dict[str, Tensor] = {}
    for file in files or [usual]:
        found = read_tensors(file)
        if twice := sorted(tensors.keys() & found.keys()):
            raise CheckpointError(file, twice[0], "is in another file as well")
        tensors |= found
    return tensors


def dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _check_listed(folder: Path, manifest: Manifest) -> None:
    if sorted(manifest.files) != sorted(FILES):
        problem = f"{sorted(manifest.files)!r:.200}, expected {sorted(FILES)}"
        raise CheckpointError(folder / FILE_NAME, "files", problem)


def _check_hash(path: Path, manifest: Manifest, size_limit: int) -> None:
    size = check_regular(path, CheckpointError)
    if size > size_limit:  # not read: a sparse file costs nothing to make
        raise CheckpointError(path, "file", f"{size} bytes, expected at most {size_limit}")
    found, expected = sha256_of(path), manifest.files[path.name]
    if found != expected:
        problem = f"{found}, but the manifest says {expected:.64}"
        raise CheckpointError(path, "sha256", problem)


def _size_limit(config: dict[str, Any]) -> int:
    """Of the weights in bytes: every tensor in the widest dtype there is, and a header."""
    expected = expected_tensors(config)
    shapes = (*expected.required.values(), *expected.optional.values())
    return 8 + _HEADER_LIMIT + sum(8 * math.prod(shape) for shape in shapes)


def _check_manifest(
    folder: Path, manifest: Manifest, config: dict[str, Any], tensors: dict[str, Tensor]
) -> None:
    path = folder / FILE_NAME
    if manifest.kind != kind_of(config):
        raise CheckpointError(path, "kind", f"{manifest.kind}, but the config says otherwise")
    if manifest.layer_ids != aux_layer_ids(config):
        raise CheckpointError(path, "layer_ids", f"{manifest.layer_ids} differ from the config's")
    listed = {name: (spec.dtype, tuple(spec.shape)) for name, spec in manifest.tensors.items()}
    found = {name: (dtype_name(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    if listed != found:
        raise CheckpointError(path, "tensors", f"differ from those in {WEIGHTS}")


def _check_target(
    folder: Path, config: dict[str, Any], target: TargetFingerprint, manifest: Manifest | None
) -> None:
    # Not the architecture: engines and transformers name the same policy differently.
    fields = {"target_hidden_size": target.hidden_size, "vocab_size": target.vocab_size}
    if tells_layers(config):
        fields["num_hidden_layers"] = target.num_hidden_layers
    for field, expected in fields.items():
        # A draft model reads nothing of the policy's, so its width is its own.
        if config.get(field, expected) != expected:
            problem = f"{config[field]}, but the policy has {expected}"
            raise CheckpointError(folder / CONFIG, field, problem)
    if manifest is not None:
        for field in ("hidden_size", "vocab_size", "num_hidden_layers"):
            found, expected = getattr(manifest.target, field), getattr(target, field)
            if found != expected:
                problem = f"{found}, but the policy has {expected}"
                raise CheckpointError(folder / FILE_NAME, f"target.{field}", problem)
    layers = target.num_hidden_layers
    deepest = max(aux_layer_ids(config), default=0)
    if deepest > layers:
        problem = f"{deepest}, but the policy has {layers} layers"
        raise CheckpointError(folder / CONFIG, "eagle_aux_hidden_state_layer_ids", problem)


def _check_tensors(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    expected = expected_tensors(config)
    shapes = {**expected.required, **expected.optional}
    canonical = {_canonical(name): tensor for name, tensor in tensors.items()}
    if len(canonical) != len(tensors):
        raise CheckpointError(path, LAYER, f"also present as {LAYER_ALIAS}")
    missing = sorted(expected.required.keys() - canonical.keys())
    if missing:
        raise CheckpointError(path, missing[0], _missing(missing))
    unknown = sorted(canonical.keys() - shapes.keys())
    if unknown and not expected.others:
        raise CheckpointError(path, unknown[0], "unknown tensor, or not one this config has")
    for name, tensor in canonical.items():
        _check_tensor(path, name, tensor, shapes.get(name, tuple(tensor.shape)))


def _canonical(name: str) -> str:
    return LAYER + name.removeprefix(LAYER_ALIAS) if name.startswith(LAYER_ALIAS) else name


def _missing(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"missing{more}"


def _check_tensor(path: Path, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(path, name, f"shape {list(tensor.shape)}, expected {list(shape)}")
    allowed = _DTYPES.get(name, _FLOATS)
    if tensor.dtype not in allowed:
        names = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise CheckpointError(path, name, f"dtype {dtype_name(tensor)}, expected {names}")
    # NaN and infinities survive min and max, which need no memory of the tensor's size.
    if tensor.is_floating_point():
        low, high = torch.aminmax(tensor)
        if not (math.isfinite(low) and math.isfinite(high)):
            raise CheckpointError(path, name, "holds NaN or infinite values")


def _check_draft_vocabulary(path: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    if "d2t" not in tensors:
        return
    size = config["vocab_size"]
    offsets = tensors["d2t"]
    # Compared before adding: a sum of hostile offsets could wrap around into the range.
    index = torch.arange(len(offsets))
    if bool(((offsets < -index) | (offsets >= size - index)).any()):
        raise CheckpointError(path, "d2t", f"target ids outside 0..{size - 1}")
    ids = offsets + index
    if len(ids.unique()) != len(ids):
        raise CheckpointError(path, "d2t", "two draft tokens give the same target id")
    if "t2d" in tensors and not torch.equal(tensors["t2d"].nonzero()[:, 0], ids.sort().values):
        raise CheckpointError(path, "t2d", "marks other target ids than d2t gives")
