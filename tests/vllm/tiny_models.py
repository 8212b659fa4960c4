"""Tiny policies and drafters on disk, for a real engine on CPU."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

VOCAB, HIDDEN, LAYERS, HEAD_DIM, INNER = 128, 64, 4, 32, 96
LAYER_IDS = [1, 2, 3]
ROPE_THETA = 10000.0
MAX_LENGTH = 256


@dataclass(frozen=True)
class Size:
    """Of a policy and its drafters; vocabulary, head size and length are always those above."""

    hidden: int = HIDDEN
    layers: int = LAYERS
    inner: int = INNER

    @property
    def heads(self) -> int:
        return self.hidden // HEAD_DIM


TINY = Size()
# As the demo's policy: deep and narrow, so that an engine's step costs time as a large one's does.
DEEP = Size(hidden=128, layers=24, inner=256)


def make_policy(folder: Path, seed: int = 0, size: Size = TINY) -> Path:
    """A random Qwen3 with enough spread in its logits that sampling means something."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=size.hidden,
        intermediate_size=size.inner,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=1,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        rope_theta=ROPE_THETA,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        # Norms that are not all ones, so that a forgotten one would show.
        model.model.norm.weight.uniform_(0.5, 1.5)
        # The last token mostly decides the next: what a small drafter can guess.
        model.model.embed_tokens.weight *= 10
        damped = 0.12 / size.layers**0.5
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= damped
            layer.mlp.down_proj.weight *= damped
    model.save_pretrained(folder)
    return folder


def make_granite(folder: Path) -> Path:
    """A random policy that divides its logits by 8."""
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    config = GraniteConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        logits_scaling=8.0,
    )
    GraniteForCausalLM(config).save_pretrained(folder)
    return folder


def load_policy(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def make_drafter(
    folder: Path, tensors: dict[str, Tensor] | None = None, size: Size = TINY, **config: Any
) -> Path:
    """An eagle3 drafter in vLLM's raw layout; random unless ``tensors`` are given."""
    folder.mkdir(parents=True, exist_ok=True)
    document = {
        "architectures": ["LlamaForCausalLMEagle3"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "draft_vocab_size": VOCAB,
        "hidden_size": size.hidden,
        "target_hidden_size": size.hidden,
        "intermediate_size": size.inner,
        "num_hidden_layers": 1,
        "num_attention_heads": size.heads,
        "num_key_value_heads": size.heads,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": MAX_LENGTH,
        "rms_norm_eps": 1e-6,
        "rope_theta": ROPE_THETA,
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "norm_before_residual": False,
        "num_aux_hidden_states": 3,
        "eagle_aux_hidden_state_layer_ids": LAYER_IDS,
        "eagle_config": {"eagle_aux_hidden_state_layer_ids": LAYER_IDS},
        **config,
    }
    (folder / "config.json").write_text(json.dumps(document))
    save_file(tensors or random_drafter(0, size), folder / "model.safetensors")
    return folder


def random_drafter(seed: int, size: Size = TINY) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = size.hidden, size.inner

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    norms = ("input_layernorm", "hidden_norm", "post_attention_layernorm")
    return {
        "fc.weight": normal(hidden, 3 * hidden),
        **{f"midlayer.{name}.weight": torch.ones(hidden) for name in norms},
        "midlayer.self_attn.q_proj.weight": normal(hidden, 2 * hidden),
        "midlayer.self_attn.k_proj.weight": normal(hidden, 2 * hidden),
        "midlayer.self_attn.v_proj.weight": normal(hidden, 2 * hidden),
        "midlayer.self_attn.o_proj.weight": normal(hidden, hidden),
        "midlayer.mlp.gate_proj.weight": normal(inner, hidden),
        "midlayer.mlp.up_proj.weight": normal(inner, hidden),
        "midlayer.mlp.down_proj.weight": normal(hidden, inner),
        "norm.weight": torch.ones(hidden),
        "lm_head.weight": normal(VOCAB, hidden),
    }


def bigram_drafter(policy: Any) -> dict[str, Tensor]:
    """Guesses the next token from the last one's embedding alone, as the policy mostly does.

    Attention looks sharply at its own position and passes the embedding through; features are
    ignored.
    """
    config = policy.config
    size = Size(config.hidden_size, config.num_hidden_layers, config.intermediate_size)
    identity, nothing = torch.eye(size.hidden), torch.zeros(size.hidden, size.hidden)
    embedding = torch.cat([identity, nothing], dim=1)
    return random_drafter(0, size) | {
        "fc.weight": torch.zeros(size.hidden, 3 * size.hidden),
        "midlayer.self_attn.q_proj.weight": 5 * embedding,
        "midlayer.self_attn.k_proj.weight": 5 * embedding,
        "midlayer.self_attn.v_proj.weight": embedding,
        "midlayer.self_attn.o_proj.weight": identity,
        "midlayer.mlp.down_proj.weight": torch.zeros(size.hidden, size.inner),
        "norm.weight": policy.model.norm.weight.detach().clone(),
        "lm_head.weight": policy.lm_head.weight.detach().clone(),
    }


def make_causal(folder: Path, tensors: dict[str, Tensor], like: Path) -> Path:
    """A small model as a drafter: the configuration of another folder, and these tensors."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_bytes((like / "config.json").read_bytes())
    save_file(tensors, folder / "model.safetensors")
    return folder


def make_mimo(folder: Path, seed: int = 0) -> Path:
    """A random MiMo policy: a Qwen2 trunk with one MTP layer."""
    from transformers import Qwen2Config, Qwen2ForCausalLM

    torch.manual_seed(seed)
    config = Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=False,
        rope_theta=ROPE_THETA,
        initializer_range=0.3,
        bos_token_id=0,
        eos_token_id=1,
    )
    model = Qwen2ForCausalLM(config).eval()
    with torch.no_grad():
        model.model.norm.weight.uniform_(0.5, 1.5)
    model.save_pretrained(folder)
    document = json.loads((folder / "config.json").read_text())
    document |= {"architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    (folder / "config.json").write_text(json.dumps(document))
    trunk = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(trunk | mimo_head(seed), folder / "model.safetensors")
    return folder


def mimo_head(seed: int) -> dict[str, Tensor]:
    """Random tensors of its MTP layer, which is what a drafter folder of kind mtp holds."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.05

    prefix = "model.mtp_layers.0."
    norms = ("token", "hidden", "final", "input", "post_attention")
    tensors = {f"{prefix}{name}_layernorm.weight": torch.ones(HIDDEN) for name in norms}
    for name, rows, columns in (
        ("input_proj", HIDDEN, 2 * HIDDEN),
        ("self_attn.q_proj", 2 * HEAD_DIM, HIDDEN),
        ("self_attn.k_proj", HEAD_DIM, HIDDEN),
        ("self_attn.v_proj", HEAD_DIM, HIDDEN),
        ("self_attn.o_proj", HIDDEN, 2 * HEAD_DIM),
        ("mlp.gate_proj", INNER, HIDDEN),
        ("mlp.up_proj", INNER, HIDDEN),
        ("mlp.down_proj", HIDDEN, INNER),
    ):
        tensors[f"{prefix}{name}.weight"] = normal(rows, columns)
        if name.endswith(("q_proj", "k_proj", "v_proj")):
            tensors[f"{prefix}{name}.bias"] = normal(rows)
    return tensors
