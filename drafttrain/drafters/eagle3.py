"""Eagle3: decoder layers that read some of the policy's layers and draft from them.

Architecture and training-time test from EAGLE-3 (arXiv 2503.01840); the forward is that of vLLM's
``llama_eagle3.py`` and ``qwen3_eagle3.py``, so that what is trained is what drafts::

    g        = fc(cat(aux))                                     features of slot s
    x        = cat(input_layernorm(embed), hidden_norm(g))      [.., 2H]
    h        = attention(x) + residual                          residual: g, or hidden_norm(g)
    out      = mlp(post_attention_layernorm(h)) + h             further layers likewise, from out
    logits   = lm_head(norm(out))
    g        = out, or norm(out)                                of the next depth

Variants, all named in ``config.json``: ``norm_before_residual``, ``norm_before_fc`` (one norm over
cat(aux)), ``fc_norm`` (a norm for each of aux), ``norm_output`` (the next g), ``attention_bias``, a
head over a draft vocabulary, and an embedding of its own, without which its width is the policy's.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar, Self, cast

import torch
import torch.nn.functional as F
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

from drafttrain.checkpoints.eagle3_format import LAYER, LAYER_ALIAS, as_sglang
from drafttrain.checkpoints.manifest import Kind, TargetFingerprint, read_json
from drafttrain.checkpoints.speculators_format import as_speculators, with_t2d
from drafttrain.checkpoints.verify import CONFIG, verify
from drafttrain.config import validated
from drafttrain.drafters.batch import Batch, pad_rows
from drafttrain.drafters.contract import Drafter, write_drafter
from drafttrain.drafters.eagle3_config import (
    Eagle3Variant,
    default_layer_ids,
    loaded_config,
    new_config,
)
from drafttrain.drafters.eagle3_layer import AttentionPlans, Eagle3Layer, UnrolledLayer
from drafttrain.drafters.kernels import compute_dtype, embed, unit_rms
from drafttrain.drafters.policy import PolicyShape, fix_longrope, read_config, read_policy_head
from drafttrain.errors import CheckpointError

_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


class Eagle3Drafter(Drafter):
    """See the module."""

    kind: ClassVar[Kind] = "eagle3"

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        fix_longrope(config)
        self.config = config
        self.layer_ids = tuple(config.eagle_aux_hidden_state_layer_ids)
        hidden, read = config.hidden_size, config.target_hidden_size
        features, eps = len(self.layer_ids) * read, config.rms_norm_eps
        self.input_norm = LlamaRMSNorm(features, eps=eps) if config.norm_before_fc else None
        self.fc_norm = None
        if config.fc_norm:
            self.fc_norm = nn.ModuleList(LlamaRMSNorm(read, eps=eps) for _ in self.layer_ids)
        self.fc = nn.Linear(features, hidden, bias=False)
        # A checkpoint's midlayer.* or layers.0.*, layers.1.*, ...
        self.layers = nn.ModuleList(
            Eagle3Layer(config, index=index) for index in range(config.num_hidden_layers)
        )
        self.norm = LlamaRMSNorm(hidden, eps=eps)
        self.lm_head = nn.Linear(hidden, config.draft_vocab_size, bias=False)
        self.embed_tokens: nn.Embedding | None = None
        if hidden != read:
            self._add_embedding()
        self.rotary = LlamaRotaryEmbedding(config)
        self.d2t: Tensor | None
        reduced = config.draft_vocab_size != config.vocab_size
        offsets = torch.zeros(config.draft_vocab_size, dtype=torch.int64) if reduced else None
        self.register_buffer("d2t", offsets)

    def _add_embedding(self) -> None:
        """One of its own, in place of the policy's; it is not trained."""
        shape = self.config.vocab_size, self.config.hidden_size
        self.embed_tokens = nn.Embedding(*shape).requires_grad_(False)

    @property
    def hidden_size(self) -> int:
        return int(self.config.hidden_size)

    @property
    def draft_ids(self) -> Tensor | None:
        if self.d2t is None:
            return None
        return torch.arange(len(self.d2t), device=self.d2t.device) + self.d2t

    def unroll(self, batch: Batch, embed_tokens: Tensor, depths: int) -> Tensor:
        dtype, eps = compute_dtype(self.fc.weight), self.config.rms_norm_eps
        # Padded, so that what is behind their ends is nobody's and gets no gradient.
        slots, rounds = pad_rows(batch.slots), pad_rows(batch.rounds)
        hidden = F.linear(self._features(batch, slots).to(dtype), self.fc.weight.to(dtype))
        layers = self._unrolled_layers(batch, embed_tokens, dtype)
        rotations = self._rotations(int(batch.lengths.max()) + depths, dtype)
        # Depth 0 has keys at every slot, prompts included; rounds start only at some of them.
        starts, rows, outputs = batch.slots, slots, []
        for depth in range(depths):
            # Past the last token there is nothing to embed, and nothing there is trained on.
            end = len(batch.tokens)
            embedded = pad_rows((starts + 1 + depth).clamp_max(end), fill=end)
            rotation = rotations[:, batch.positions[rows] + depth]
            for layer in layers:
                hidden = layer(hidden, embedded, rotation)
            drafting = unit_rms(hidden, eps) * self.norm.weight.to(dtype)
            outputs.append(drafting[: len(batch.rounds)])
            if self.config.norm_output:
                hidden = drafting
            starts, rows = batch.rounds, rounds
        return torch.stack(outputs)

    def _features(self, batch: Batch, slots: Tensor) -> Tensor:
        """[S, A * Ht]: the policy's aux states at `slots`, as ``fc`` reads them."""
        if batch.aux_hidden is None:
            raise ValueError("an Eagle3 drafter needs the policy's aux hidden states")
        states, eps = batch.aux_hidden.index_select(0, slots), self.config.rms_norm_eps
        if self.input_norm is not None:
            together = states.to(self.fc.weight.dtype).flatten(1)
            states = (unit_rms(together, eps) * self.input_norm.weight).view(states.shape)
        if self.fc_norm is not None:
            weights = torch.stack([*self.fc_norm.parameters()])
            states = unit_rms(states.to(weights.dtype), eps) * weights
        return states.flatten(1)

    def _unrolled_layers(
        self, batch: Batch, embed_tokens: Tensor, dtype: torch.dtype
    ) -> list[UnrolledLayer]:
        if self.embed_tokens is not None:
            embed_tokens = self.embed_tokens.weight
        embeds = embed(pad_rows(batch.tokens, fill=0), embed_tokens).to(dtype)
        plans = AttentionPlans(batch, len(self.layers), dtype)
        last, eps = len(self.layers) - 1, self.config.rms_norm_eps
        return [
            UnrolledLayer(layer, plans, embeds, eps, dtype, last=index == last)
            for index, layer in enumerate(cast("Iterable[Eagle3Layer]", self.layers))
        ]

    def _rotations(self, count: int, dtype: torch.dtype) -> Tensor:
        """Cosine and sine at the first `count` positions, for ``rotate``: [2, count, 1, d]."""
        positions = torch.arange(count, device=self.fc.weight.device)
        cos, sin = self.rotary(self.fc.weight, positions[None])
        sin[..., : sin.shape[-1] // 2].neg_()
        return torch.cat([cos, sin])[:, :, None].to(dtype)

    def head_weight(self, policy_head: Tensor) -> Tensor:
        return self.lm_head.weight

    @classmethod
    def initialise(
        cls,
        policy: PolicyShape,
        *,
        layer_ids: tuple[int, ...] | None = None,
        draft_ids: Tensor | None = None,
        **variant: Any,
    ) -> Self:
        """At random.

        Args:
            policy: what it drafts for.
            layer_ids: aux layers it reads, ascending; :func:`default_layer_ids` when absent.
            draft_ids: int64 [Vd], ascending: the target ids it can draft; all when absent.
            variant: fields of :class:`Eagle3Variant`.

        Raises:
            CheckpointError: an aux layer the policy does not have.
            ConfigError: an option that is none, or a value it cannot have.
        """
        ids = layer_ids or default_layer_ids(policy.num_layers)
        if not all(0 <= layer <= policy.num_layers for layer in ids):
            problem = f"{list(ids)}; the policy has layers 0 to {policy.num_layers}"
            raise CheckpointError("eagle3", "layer_ids", problem)
        chosen = validated(Eagle3Variant, variant, "eagle3")
        drafter = cls(new_config(policy, ids, draft_ids, chosen))
        for module in drafter.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=1.0 / math.sqrt(module.in_features))
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        # Small writes to the residual: the first drafts come from fc's features alone.
        for layer in cast("Iterable[Eagle3Layer]", drafter.layers):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                nn.init.zeros_(projection.weight)
        if draft_ids is not None:
            drafter.d2t = draft_ids - torch.arange(len(draft_ids))
        return drafter

    @classmethod
    def from_policy(cls, folder: Path, policy: PolicyShape, **options: Any) -> Self:
        """At random, but for the output: norm and head are the policy's."""
        drafter = cls.initialise(policy, **options)
        head = read_policy_head(folder, policy)
        rows = slice(None) if drafter.draft_ids is None else drafter.draft_ids
        with torch.no_grad():
            drafter.lm_head.weight.copy_(head.lm_head[rows])
            if head.final_norm is not None:
                drafter.norm.weight.copy_(head.final_norm)
        return drafter

    @classmethod
    def load(cls, folder: Path, policy: PolicyShape) -> Self:
        """Read a folder of the raw layout or that of ``speculators``.

        What it lacks is the policy's, as in the engine, and what it copied from there is left out.
        """
        verified = verify(folder, TargetFingerprint.from_config(policy.config.to_dict()))
        try:
            drafter = cls(loaded_config(verified.config, policy))
        except (StrictDataclassError, ValueError, TypeError, KeyError) as error:
            raise CheckpointError(folder / CONFIG, "file", f"cannot be used: {error}") from error
        spare = {"t2d"} | {f"layers.{i}.hidden_norm.weight" for i in range(1, len(drafter.layers))}
        tensors = {
            name.replace(LAYER, LAYER_ALIAS, 1): tensor
            for name, tensor in verified.tensors.items()
            if name not in spare
        }
        if _HEAD not in tensors:
            tensors[_HEAD] = _policys_head(folder, policy)
        if drafter.embed_tokens is None and _EMBEDDING in tensors:
            if _is_policys(tensors[_EMBEDDING], policy):
                del tensors[_EMBEDDING]
            else:
                drafter._add_embedding()
        drafter.load_state_dict(tensors)
        return drafter

    def export(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        tensors = {
            name.replace(LAYER_ALIAS, LAYER, 1): tensor
            for name, tensor in self.state_dict().items()
        }
        tensors = with_t2d(tensors, self.config.vocab_size)
        write_drafter(folder, self.config.to_diff_dict(), tensors, dtype)

    def export_sglang(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        """Write the raw layout with aux layers as SGLang counts them.

        Raises:
            CheckpointError: it reads the embedding (layer 0), which SGLang cannot hand over.
        """
        self.export(folder, dtype)
        config = as_sglang(read_json(folder / CONFIG), folder / CONFIG)
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")

    def export_speculators(
        self, folder: Path, policy: Path, *, k: int, dtype: torch.dtype = torch.float32
    ) -> None:
        """Write the layout of the ``speculators`` library; the folder alone starts ``vllm serve``.

        Args:
            folder: to write.
            policy: the policy's folder, named in it.
            k: draft tokens that are then drafted.
            dtype: of the weights.
        """
        architectures = read_config(policy)["architectures"]
        config = as_speculators(self.config.to_diff_dict(), str(policy), architectures, k)
        tensors = with_t2d(self.state_dict(), self.config.vocab_size)
        write_drafter(folder, config, tensors, dtype)


def _policys_head(folder: Path, policy: PolicyShape) -> Tensor:
    """
    Raises:
        CheckpointError: the policy's weights are not at hand.
    """
    if policy.folder is None:
        raise CheckpointError(folder, _HEAD, "missing, and so is the policy's, which it would be")
    return read_policy_head(policy.folder, policy).lm_head


def _is_policys(embedding: Tensor, policy: PolicyShape) -> bool:
    """Whether it is a copy of the policy's, as far as that is at hand."""
    if policy.folder is None:
        return False
    try:
        policys = read_policy_head(policy.folder, policy).embed_tokens
    except CheckpointError:  # nothing but its configuration
        return False
    return torch.equal(embedding, policys.to(embedding.dtype))
