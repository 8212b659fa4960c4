"""A policy's folder with some of its tensors replaced, or new ones added."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Set
from itertools import count
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from drafttrain.drafters.contract import as_written
from drafttrain.drafters.policy import read_config, read_tensors, trunk_prefix, weight_files
from drafttrain.errors import CheckpointError
from drafttrain.tensorfile import map_tensors

_INDEX = "model.safetensors.index.json"
_HEADER_LIMIT = 100 << 20  # safetensors' own


def stitch_tensors(
    policy: Path, tensors: dict[str, Tensor], config: dict[str, Any], out: Path
) -> None:
    """Copy a policy's folder; `tensors` take the place of those of the same names.

    They are written in the dtype of the policy's embedding, into a file of their own; of the
    policy's files only those that held one of them are written again, one at a time.

    Args:
        policy: folder of a causal LM.
        tensors: names as in its checkpoint.
        config: keys to set in the language model's configuration.
        out: a new folder, there only once it is whole.

    Raises:
        CheckpointError: `policy` cannot be read, or `out` exists or cannot be written.
    """
    if out.exists():
        raise CheckpointError(out, "folder", "exists already; expected a new one")
    unfinished = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    try:
        _copy_others(policy, tensors.keys(), unfinished)
        _add(policy, tensors, unfinished)
        _set(policy, config, unfinished)
        unfinished.rename(out)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(out, "folder", f"cannot be written: {error}") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)  # gone, once it has its name


def _copy_others(policy: Path, replaced: Set[str], out: Path) -> None:
    """Copy all of a policy's folder but its index and these tensors."""
    files = weight_files(policy)
    names = {file.name for file in files.values()} | {_INDEX}
    here = str(policy)  # what folders within have by the same names is not the policy's
    shutil.copytree(policy, out, ignore=lambda folder, _: names if folder == here else ())
    touched = {files[name] for name in files.keys() & replaced}
    for file in sorted({*files.values()} - touched):
        shutil.copy2(file, out / file.name)
    for file in sorted(touched):
        held = map_tensors(file, CheckpointError, max_header=_HEADER_LIMIT)[0]
        kept = {name: tensor for name, tensor in held.items() if name not in replaced}
        if kept:
            save_file(kept, out / file.name, metadata={"format": "pt"})


def _add(policy: Path, tensors: dict[str, Tensor], out: Path) -> None:
    """Write `tensors` beside the policy's files, and the index of all."""
    embedding = f"{trunk_prefix(policy)}embed_tokens.weight"
    dtype = read_tensors(policy, [embedding])[embedding].dtype
    names = (f"model-mtp{number or ''}.safetensors" for number in count())
    added = next(name for name in names if not (out / name).exists())
    save_file(as_written(tensors, dtype), out / added, metadata={"format": "pt"})
    table = {name: file.name for name, file in weight_files(policy).items()}
    table |= dict.fromkeys(tensors, added)
    (out / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}, indent=2) + "\n")


def _set(policy: Path, config: dict[str, Any], out: Path) -> None:
    """Write ``config.json``; what is set is of the language model."""
    document = read_config(policy)
    text = document.get("text_config")
    (text if isinstance(text, dict) else document).update(config)
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")
