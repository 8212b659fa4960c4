"""What a drafter takes from its policy: its shape (configuration) and its head (weights)."""

from __future__ import annotations

import json
import math
import re
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

# How the names of a policy's embedding and lm_head end, whatever they start with.
_EMBEDDING = "embed_tokens.weight"
_LM_HEAD = "lm_head.weight"

# What families call the epsilon of their norms.
_NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "norm_epsilon", "layer_norm_epsilon")
# Families whose norms multiply by 1 + weight.
_NORM_ADDS_ONE = frozenset(
    {
        *("gemma", "gemma2", "gemma3", "gemma3_text", "recurrent_gemma", "vaultgemma"),
        *("qwen3_next", "qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text"),
    }
)
# MTP heads and the towers of a multimodal policy have tensors that end like the language model's.
_NOT_THE_TRUNKS = re.compile(r"layers|mtp|visual|vision|audio")

_PARTIAL_ROPE = ("partial_rotary_factor", "mrope_section", "mrope_interleaved")
_ORIGINAL = "original_max_position_embeddings"
_PLAIN_ROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0}

# Policies whose configuration class is remote code, and the one it differs from in name only.
_KNOWN_AS = {"mimo": "qwen2", "kimi_k2": "deepseek_v3"}


@dataclass(frozen=True)
class PolicyShape:
    """What a drafter must know of its policy's configuration.

    Attributes:
        config: the policy's text configuration, as transformers reads it.
        folder: where it was read; None when it was not.
    """

    config: PretrainedConfig
    folder: Path | None = None

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
        return cls(config.get_text_config(), Path(folder))

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
        given: dict[str, Any] = getattr(self.config, "rope_parameters", None) or _PLAIN_ROPE
        given = given.get("full_attention", given)
        if given.get("rope_type") == "longrope" and given.get("partial_rotary_factor", 1) != 1:
            # Its factors are for the part of a head that the policy turns.
            given = _PLAIN_ROPE | {"rope_theta": given["rope_theta"]}
        return {key: value for key, value in given.items() if key not in _PARTIAL_ROPE}

    @property
    def norm_eps(self) -> float:
        given = (getattr(self.config, name, None) for name in _NORM_EPS)
        return float(next((eps for eps in given if eps is not None), 1e-6))

    @property
    def norm_offset(self) -> float:
        """What its norms add to their weights before they multiply by them."""
        return 1.0 if self.config.model_type in _NORM_ADDS_ONE else 0.0

    @property
    def heads(self) -> tuple[int, int]:
        """Of queries, and of keys and values."""
        heads = int(self.config.num_attention_heads)
        return heads, int(getattr(self.config, "num_key_value_heads", None) or heads)

    @property
    def head_dim(self) -> int:
        given = self.config.to_dict().get("head_dim")
        return int(given or self.hidden_size // self.config.num_attention_heads)


def fix_longrope(config: PretrainedConfig) -> None:
    """Have a drafter turn by the same factors wherever it runs, those for its longest context.

    With two sets of them transformers chooses by the longest position of a batch, and vLLM, once
    for all, by its ``max_model_len``, which for a draft model ends at the original length: what is
    trained would not be what drafts.
    """
    if rope := getattr(config, "rope_parameters", None):
        config.rope_parameters = _with_one_set(rope, config.max_position_embeddings)
        if rope.get("rope_type") == "longrope" and hasattr(config, _ORIGINAL):
            setattr(config, _ORIGINAL, config.max_position_embeddings)


def _with_one_set(rope: dict[str, Any], longest: int) -> dict[str, Any]:
    if rope.get("rope_type") != "longrope":
        nested = {name: of for name, of in rope.items() if isinstance(of, dict)}
        return rope | {name: _with_one_set(of, longest) for name, of in nested.items()}
    longer = longest / rope[_ORIGINAL]
    chosen = "long" if longer > 1 else "short"
    scale = rope.get(f"{chosen}_mscale")
    if scale is None:  # vLLM knows no attention_factor: this is what it computes
        scale = math.sqrt(1 + max(math.log(longer), 0.0) / math.log(rope[_ORIGINAL]))
    factors = dict.fromkeys(("short_factor", "long_factor"), rope[f"{chosen}_factor"])
    scales = dict.fromkeys(("short_mscale", "long_mscale", "attention_factor"), scale)
    return rope | factors | scales | {_ORIGINAL: longest}


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

    Of the norm comes what it multiplies by, whatever the family keeps.

    Raises:
        CheckpointError: a file or one of the tensors is missing or has another shape.
    """
    folder = Path(folder)
    expected = (policy.vocab_size, policy.hidden_size)
    trunk = trunk_prefix(folder)
    embed_tokens = _read_tensor(folder, trunk + _EMBEDDING, expected)
    tied = getattr(policy.config, "tie_word_embeddings", None)
    if tied is None:  # a multimodal policy says so of the whole, not of its language model
        tied = not any(name.endswith(_LM_HEAD) for name in weight_files(folder))
    return PolicyHead(
        policy_version=0,
        embed_tokens=embed_tokens,
        lm_head=embed_tokens if tied else _read_tensor(folder, _find(folder, _LM_HEAD), expected),
        final_norm=_read_tensor(folder, f"{trunk}norm.weight", expected[1:]) + policy.norm_offset,
        norm_eps=policy.norm_eps,
    )


def trunk_prefix(folder: Path) -> str:
    """What the names of the trunk start with: ``model.``, or that of a part of a multimodal policy.

    Raises:
        CheckpointError: there is no embedding to tell it by, or more than one.
    """
    return _find(folder, _EMBEDDING).removesuffix(_EMBEDDING)


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
        CheckpointError: one is missing, its file cannot be read, or it holds numbers of 8 bits,
            which mean nothing without their scales.
    """
    files = weight_files(folder)
    tensors: dict[str, Tensor] = {}
    for name in names:
        try:
            with safe_open(files[name], framework="pt") as file:
                tensor = tensors[name] = file.get_tensor(name)
        except (OSError, SafetensorError, KeyError) as error:
            raise CheckpointError(folder, name, f"cannot be read: {error}") from error
        if tensor.is_floating_point() and tensor.itemsize == 1:
            found = str(tensor.dtype).removeprefix("torch.")
            problem = f"{found}, expected 16 bits or more: convert a quantised policy first"
            raise CheckpointError(folder, name, problem)
    return tensors


def _find(folder: Path, ending: str) -> str:
    """The one name of the language model that ends so.

    Raises:
        CheckpointError: there is none, or more than one.
    """
    names = (name for name in weight_files(folder) if f".{name}".endswith(f".{ending}"))
    found = sorted(name for name in names if not _NOT_THE_TRUNKS.search(name))
    if len(found) != 1:
        problem = f"found {', '.join(found) or 'none'}; expected one in the language model"
        raise CheckpointError(folder, ending, problem)
    return found[0]


def _read_tensor(folder: Path, name: str, shape: tuple[int, ...]) -> Tensor:
    tensor = read_tensors(folder, [name])[name]
    if tuple(tensor.shape) != shape:
        raise CheckpointError(folder, name, f"shape {list(tensor.shape)}, expected {list(shape)}")
    return tensor
