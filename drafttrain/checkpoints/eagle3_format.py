"""Eagle3 drafters in vLLM's raw layout (vLLM 0.32, ``llama_eagle3.py`` and ``qwen3_eagle3.py``)."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from drafttrain.checkpoints.decoder_format import ExpectedTensors, Shapes
from drafttrain.checkpoints.manifest import Parts, Size
from drafttrain.config import explain
from drafttrain.errors import CheckpointError

LLAMA, QWEN3 = "LlamaForCausalLMEagle3", "Eagle3Qwen3ForCausalLM"
# What published drafters call themselves, and which of the engine's two models runs them
# (``models/registry.py``).
_MODELS = {
    LLAMA: LLAMA,
    "Eagle3LlamaForCausalLM": LLAMA,
    "Eagle3MiniMaxM2ForCausalLM": LLAMA,
    "Eagle3Qwen2_5vlForCausalLM": LLAMA,
    "Eagle3Qwen3vlForCausalLM": LLAMA,
    QWEN3: QWEN3,
}

# The decoder layer has two names in the wild; shapes are listed under the first.
LAYER = "midlayer."
LAYER_ALIAS = "layers.0."

# What a layer attends to: all before it, or a window of it.
FULL, SLIDING = "full_attention", "sliding_attention"

_LAYER_IDS = "eagle_aux_hidden_state_layer_ids"

# Keys that change what the engine computes, and the only values that are computed here as well.
_NEUTRAL: dict[str, Any] = {
    "logit_scale": 1,
    "partial_rotary_factor": 1,
    "is_causal": True,
    "bias": False,
    "qkv_bias": False,
}


class Eagle3Config(BaseModel):
    """What decides the tensors of an Eagle3 drafter; defaults are the engine's."""

    model_config = ConfigDict(extra="ignore", frozen=True, strict=True)

    architectures: list[str]
    """One of :data:`LLAMA` and :data:`QWEN3`."""
    hidden_size: Size
    intermediate_size: Size
    num_attention_heads: Size
    num_key_value_heads: Size
    num_hidden_layers: Parts
    head_dim: Size
    vocab_size: Size
    """Of the target."""
    draft_vocab_size: Size
    target_hidden_size: Size
    eagle_aux_hidden_state_layer_ids: list[int]
    num_aux_hidden_states: Parts
    norm_before_residual: bool = False
    norm_before_fc: bool = False
    fc_norm: bool = False
    norm_output: bool = False
    attention_bias: bool = False
    mlp_bias: Literal[False] = False
    hidden_act: Literal["silu"] = "silu"
    layer_types: list[str] | None = None
    sliding_window: int | None = None
    use_sliding_window: bool = False
    max_window_layers: int = Field(28, exclude=True)


def is_eagle3(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` of the raw layout is an Eagle3 drafter's.

    Many call themselves what their layer is; then what no other model has tells.
    """
    named = any("Eagle3" in name for name in _architectures(config))
    return named or any(config.get(key) is not None for key in ("draft_vocab_size", "eagle_config"))


def _architectures(config: dict[str, Any]) -> list[str]:
    given = config.get("architectures")
    return [name for name in given if isinstance(name, str)] if isinstance(given, list) else []


def with_layer_ids(config: dict[str, Any], num_layers: int) -> dict[str, Any]:
    """`config` with the aux layers that the engine reads from a policy where it names none.

    Many published drafters name none; vLLM's models have one default for all
    (``get_eagle3_default_aux_hidden_state_layers``).
    """
    if _names_layers(config):
        return config
    count = config.get("num_aux_hidden_states") or 3
    ids = engine_layer_ids(num_layers)
    return config | {"num_aux_hidden_states": count, _LAYER_IDS: ids}


def with_rope_type(config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """`config` with the RoPE that older drafters call ``mrope`` named as the engine renames it.

    That is plain RoPE with a position for each section of a head (``patch_legacy_rope_type``); in
    text all of them are the same.

    Raises:
        CheckpointError: it names no sections, which the engine refuses.
    """
    for key in ("rope_parameters", "rope_scaling"):
        rope = config.get(key)
        if not isinstance(rope, dict) or rope.get("rope_type", rope.get("type")) != "mrope":
            continue
        if "mrope_section" not in rope:
            raise CheckpointError(where, f"{key}.mrope_section", "missing; type 'mrope' needs it")
        named = {name: value for name, value in rope.items() if name != "type"}
        config = config | {key: named | {"rope_type": "default"}}
    return config


def _names_layers(config: dict[str, Any]) -> bool:
    eagle = config.get("eagle_config")
    inner = eagle.get(_LAYER_IDS) if isinstance(eagle, dict) else None
    return bool(config.get(_LAYER_IDS) or inner)  # an empty list names none


def engine_layer_ids(num_layers: int) -> list[int]:
    """vLLM's default; three layers but of a shallow policy."""
    return sorted({2, num_layers // 2, num_layers - 3})


def eagle3_tensors(parsed: Eagle3Config) -> ExpectedTensors:
    """The decoder layer is listed as ``midlayer.``; files may call it ``layers.0.``."""
    hidden, vocab = parsed.hidden_size, parsed.vocab_size
    features = parsed.num_aux_hidden_states * parsed.target_hidden_size
    required: Shapes = {"fc.weight": (hidden, features), "norm.weight": (hidden,)}
    first = _layer_tensors(parsed, 2 * hidden) | {"hidden_norm.weight": (hidden,)}
    required |= {LAYER + name: shape for name, shape in first.items()}
    optional: Shapes = {"t2d": (vocab,)}
    for index in range(1, parsed.num_hidden_layers):
        layer = _layer_tensors(parsed, hidden)
        required |= {f"layers.{index}.{name}": shape for name, shape in layer.items()}
        # The engine makes one for every layer and uses the first.
        optional[f"layers.{index}.hidden_norm.weight"] = (hidden,)
    if parsed.norm_before_fc:
        required["input_norm.weight"] = (features,)
    if parsed.fc_norm:
        for index in range(parsed.num_aux_hidden_states):
            required[f"fc_norm.{index}.weight"] = (parsed.target_hidden_size,)
    if parsed.draft_vocab_size != vocab:
        required["d2t"] = (parsed.draft_vocab_size,)
    # Absent ones mean the target's, which only fit a drafter of the same width.
    fits = hidden == parsed.target_hidden_size
    (optional if fits else required)["embed_tokens.weight"] = (vocab, hidden)
    fits = fits and parsed.draft_vocab_size == vocab
    (optional if fits else required)["lm_head.weight"] = (parsed.draft_vocab_size, hidden)
    return ExpectedTensors(required, optional)


def _layer_tensors(config: Eagle3Config, width: int) -> Shapes:
    """Of a layer whose attention reads `width` features."""
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    qwen3 = config.architectures == [QWEN3]
    tensors: Shapes = {
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (queries, width),
        "self_attn.k_proj.weight": (keys, width),
        "self_attn.v_proj.weight": (keys, width),
        "self_attn.o_proj.weight": (hidden, queries),
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
    }
    if config.attention_bias:
        tensors["self_attn.q_proj.bias"] = (queries,)
        tensors["self_attn.k_proj.bias"] = tensors["self_attn.v_proj.bias"] = (keys,)
        if not qwen3:
            tensors["self_attn.o_proj.bias"] = (hidden,)
    if qwen3:
        tensors["self_attn.q_norm.weight"] = (config.head_dim,)
        tensors["self_attn.k_norm.weight"] = (config.head_dim,)
    return tensors


def parse_eagle3(config: dict[str, Any], where: str | Path) -> Eagle3Config:
    """Check ``config.json`` and fill in what the engine fills in.

    Raises:
        CheckpointError: a key is missing, or its value is wrong or contradicts another.
    """
    eagle = config.get("eagle_config") or {}
    if not isinstance(eagle, dict):
        raise CheckpointError(where, "eagle_config", "expected an object")
    if eagle.get("use_aux_hidden_state", True) is not True:
        problem = "expected true: drafters of the last state alone do not train"
        raise CheckpointError(where, "eagle_config.use_aux_hidden_state", problem)
    _check_neutral(config, where)
    if not _names_layers(config):
        problem = "missing: the engine reads its default layers; name the policy to check against"
        raise CheckpointError(where, _LAYER_IDS, problem)
    filled = _filled(config, eagle)
    if filled["architectures"] is None:
        problem = f"{config.get('architectures')!r:.120}, expected one of {', '.join(_MODELS)}"
        raise CheckpointError(where, "architectures", problem)
    try:
        parsed = Eagle3Config.model_validate(filled)
    except ValidationError as error:
        raise explain(error, where, CheckpointError) from error
    _check_layer_ids(parsed, eagle, where)
    if parsed.num_attention_heads % parsed.num_key_value_heads:
        problem = f"{parsed.num_key_value_heads}, expected a divisor of the number of heads"
        raise CheckpointError(where, "num_key_value_heads", problem)
    if parsed.draft_vocab_size > parsed.vocab_size:
        problem = f"{parsed.draft_vocab_size}, expected at most vocab_size {parsed.vocab_size}"
        raise CheckpointError(where, "draft_vocab_size", problem)
    return _with_windows(parsed, where)


def _with_windows(parsed: Eagle3Config, where: str | Path) -> Eagle3Config:
    """With a type for every layer, and a window where one has it, as the engine takes the keys."""
    layers, window = parsed.num_hidden_layers, parsed.sliding_window
    qwen3 = parsed.architectures == [QWEN3]
    used = parsed.use_sliding_window or not qwen3
    types = parsed.layer_types
    if types is None:
        full = parsed.max_window_layers if qwen3 and used else layers
        types = [FULL if index < full else SLIDING for index in range(layers)]
    if len(types) != layers:
        problem = f"{len(types)} of them, expected one for each of {layers} layers"
        raise CheckpointError(where, "layer_types", problem)
    sliding = used and SLIDING in types
    if sliding and (window is None or window < 1):
        problem = f"{window}, expected a length: layer_types has {SLIDING!r}"
        raise CheckpointError(where, "sliding_window", problem)
    windows = {
        "layer_types": [SLIDING if sliding and kind == SLIDING else FULL for kind in types],
        "sliding_window": window if sliding else None,
        "use_sliding_window": sliding,
    }
    return parsed.model_copy(update=windows)


def _check_neutral(config: dict[str, Any], where: str | Path) -> None:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    given = {**config, **rope} if isinstance(rope, dict) else config
    for key, neutral in _NEUTRAL.items():
        if given.get(key, neutral) not in (None, neutral):
            problem = f"{given[key]!r:.40}, expected {neutral}: others do not train"
            raise CheckpointError(where, key, problem)


def _filled(config: dict[str, Any], eagle: dict[str, Any]) -> dict[str, Any]:
    filled = {key: value for key, value in config.items() if value is not None}
    hidden, heads = filled.get("hidden_size"), filled.get("num_attention_heads")
    ids = filled.pop(_LAYER_IDS, None) or eagle.get(_LAYER_IDS)
    defaults = {
        _LAYER_IDS: ids,
        "num_aux_hidden_states": len(ids) if isinstance(ids, list) else None,
        "num_key_value_heads": heads,
        "target_hidden_size": hidden,
        "draft_vocab_size": filled.get("vocab_size"),
    }
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0:
        defaults["head_dim"] = hidden // heads
    # The engine reads this one from the inner object first.
    inner = {"norm_before_fc": eagle["norm_before_fc"]} if "norm_before_fc" in eagle else {}
    present = {key: value for key, value in defaults.items() if value is not None}
    return {**present, **filled, **inner, "architectures": _model(config)}


def _model(config: dict[str, Any]) -> list[str] | None:
    """Which of the engine's models runs a drafter; None for one that is not known here.

    The engine writes Eagle3 before a name that does not say so
    (``transformers_utils/configs/eagle.py``).
    """
    names = _architectures(config)
    if len(names) != 1:
        return None
    name = names[0] if "Eagle3" in names[0] else f"Eagle3{names[0]}"
    return [_MODELS[name]] if name in _MODELS else None


def _check_layer_ids(config: Eagle3Config, eagle: dict[str, Any], where: str | Path) -> None:
    ids = config.eagle_aux_hidden_state_layer_ids
    if (eagle.get(_LAYER_IDS) or ids) != ids:
        raise CheckpointError(where, f"eagle_config.{_LAYER_IDS}", f"differs from {ids} above it")
    # Ascending too: the engine sorts them, and would hand the drafter its features in that order.
    if ids != sorted(set(ids)) or len(ids) != config.num_aux_hidden_states or min(ids) < 0:
        problem = f"{ids}, expected {config.num_aux_hidden_states} distinct layers, ascending"
        raise CheckpointError(where, _LAYER_IDS, problem)


def as_sglang(config: dict[str, Any], where: str | Path) -> dict[str, Any]:
    """`config` for SGLang, which adds one to the aux layers a drafter names.

    Raises:
        CheckpointError: the drafter reads layer 0, the embedding.
    """
    ids = config[_LAYER_IDS]
    if min(ids) == 0:
        raise CheckpointError(where, _LAYER_IDS, f"{ids}: SGLang cannot hand over the embedding")
    shifted = [layer - 1 for layer in ids]
    return config | {_LAYER_IDS: shifted, "eagle_config": {_LAYER_IDS: shifted}}
