"""What a drafter takes from its policy: its shape (configuration) and its head (weights)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, PretrainedConfig

from drafttrain.checkpoints.manifest import read_json
from drafttrain.errors import CheckpointError
from drafttrain.rollouts.record import PolicyHead

# Where Hugging Face checkpoints of causal LMs keep the three tensors of the head.
_EMBEDDING = "model.embed_tokens.weight"
_FINAL_NORM = "model.norm.weight"
_LM_HEAD = "lm_head.weight"

_PARTIAL_ROPE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")

# Policies whose configuration class is remote code, and the one it differs from in name only.
_KNOWN_AS = {"mimo": "qwen2", "kimi_k2": "deepseek_v3"}


@dataclass(frozen=True)
class PolicyShape:
    """What a drafter must know of its policy's configuration.

    Attributes:
        config: the policy's text configuration, as transformers reads it.
    """

    config: PretrainedConfig

    @classmethod
    def from_folder(cls, folder: str | Path) -> PolicyShape:
        """Read ``config.json`` of a policy folder.

        Raises:
            CheckpointError: the folder or the file is missing or cannot be read.
        """
        known_as = _KNOWN_AS.get(read_config(folder).get("model_type", ""))
        try:
            if known_as is not None:
                config = AutoConfig.for_model(**read_config(folder) | {"model_type": known_as})
            else:
                config = AutoConfig.from_pretrained(str(folder), trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            problem = f"cannot be read: {error}"
            if "trust_remote_code" in str(error):
                problem = "needs Python code of the folder's own, which is never run"
            raise CheckpointError(folder, "config.json", problem) from error
        return cls(config.get_text_config())

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def vocab_size(self) -> int:
        return int(self.config.vocab_size)

    @property
    def max_length(self) -> int | None:
        """Longest context in tokens; None when the configuration does not say."""
        length: int | None = getattr(self.config, "max_position_embeddings", None)
        return length

    @property
    def num_layers(self) -> int:
        return int(self.config.num_hidden_layers)

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """Of its full attention, for a drafter, which turns the whole of a head by one position."""
        given = dict(self.config.rope_parameters)
        given = given.get("full_attention", given)
        return {key: value for key, value in given.items() if key not in _PARTIAL_ROPE}

    @property
    def head_dim(self) -> int:
        given = self.config.to_dict().get("head_dim")
        return int(given or self.hidden_size // self.config.num_attention_heads)


def load_tokenizer(folder: str | Path) -> Any:
    """The policy's tokenizer.

    Raises:
        CheckpointError: the folder has none that transformers can load.
    """
    try:
        return AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except (OSError, ValueError, KeyError) as error:
        problem = "rollouts hold text, but the policy's tokenizer cannot be loaded: "
        raise CheckpointError(folder, "tokenizer", f"{problem}{error}") from error


def read_policy_head(folder: str | Path, policy: PolicyShape) -> PolicyHead:
    """Read embedding, final norm and lm_head of a policy folder; the rest stays on disk.

    Raises:
        CheckpointError: a file or one of the tensors is missing or has another shape.
    """
    folder = Path(folder)
    expected = (policy.vocab_size, policy.hidden_size)
    embed_tokens = _read_tensor(folder, _EMBEDDING, expected)
    tied = bool(policy.config.tie_word_embeddings)
    return PolicyHead(
        policy_version=0,
        embed_tokens=embed_tokens,
        lm_head=embed_tokens if tied else _read_tensor(folder, _LM_HEAD, expected),
        final_norm=_read_tensor(folder, _FINAL_NORM, expected[1:]),
        norm_eps=float(policy.config.rms_norm_eps),
    )


def read_config(folder: str | Path) -> dict[str, Any]:
    """``config.json`` of a policy folder, as it stands there.

    Raises:
        CheckpointError: the folder or the file is missing or is not a JSON object.
    """
    if not (Path(folder) / "config.json").is_file():
        raise CheckpointError(folder, "config.json", "missing; expected a policy folder")
    return read_json(Path(folder) / "config.json")


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name to the file of `folder` that holds it.

    Raises:
        CheckpointError: there are no weights, or they cannot be read.
    """
    index = folder / "model.safetensors.index.json"
    try:
        if index.exists():
            # The index comes from outside: only a plain name in this folder is followed.
            table = json.loads(index.read_text())["weight_map"]
            return {name: folder / Path(file).name for name, file in table.items()}
        single = folder / "model.safetensors"
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)
    except (OSError, SafetensorError, LookupError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(folder, "weights", f"cannot be read: {error}") from error


def read_tensors(folder: Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Map these tensors of a policy folder; the rest stays on disk.

    Raises:
        CheckpointError: one is missing or its file cannot be read.
    """
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(files[name], framework="pt") as file:
                tensors[name] = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(folder, name, f"cannot be read: {error}") from error
    return tensors


def _read_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = read_tensors(folder, [name])[name]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(folder, name, f"shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor
