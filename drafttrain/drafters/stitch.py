"""A policy's folder with some of its tensors replaced, or new ones added."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from drafttrain.drafters.policy import read_config, read_tensors, weight_files
from drafttrain.errors import CheckpointError

_INDEX = "model.safetensors.index.json"
_ADDED = "model-mtp.safetensors"


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
        out: a new folder.

    Raises:
        CheckpointError: `policy` cannot be read, or `out` exists.
    """
    if out.exists():
        raise CheckpointError(out, "folder", "exists already; expected a new one")
    files = weight_files(policy)
    replaced = files.keys() & tensors.keys()
    touched = {files[name] for name in replaced}
    weights = {*files.values(), policy / _INDEX}
    shutil.copytree(policy, out, ignore=lambda _, names: {f.name for f in weights} & {*names})
    for file in sorted(set(files.values())):
        if file in touched:
            kept = {n: t for n, t in load_file(file).items() if n not in tensors}
            if kept:
                save_file(kept, out / file.name, metadata={"format": "pt"})
        else:
            shutil.copy2(file, out / file.name)
    dtype = _dtype_of(policy, files)
    added = {name: tensor.detach().to("cpu", dtype).clone() for name, tensor in tensors.items()}
    save_file(added, out / _ADDED, metadata={"format": "pt"})
    table = {name: file.name for name, file in files.items()} | dict.fromkeys(tensors, _ADDED)
    (out / _INDEX).write_text(json.dumps({"metadata": {}, "weight_map": table}, indent=2) + "\n")
    document = read_config(policy)
    text = document.get("text_config")
    (text if isinstance(text, dict) else document).update(config)
    (out / "config.json").write_text(json.dumps(document, indent=2) + "\n")


def _dtype_of(policy: Path, files: dict[str, Path]) -> Any:
    name = next((name for name in files if name.endswith("embed_tokens.weight")), None)
    if name is None:
        raise CheckpointError(policy, "embed_tokens.weight", "missing")
    return read_tensors(policy, [name])[name].dtype
