"""One cell of the comparison and its data: the same policy, rollouts and features for everyone."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Literal

import torch
from transformers import LlamaConfig

from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout

Precision = Literal["float32", "bfloat16"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
"""Where everyone trains: on a GPU when there is one."""
LAYER_IDS = (1, 2, 3)


@dataclass(frozen=True)
class Cell:
    """Shapes of one training step.

    Attributes:
        hidden: H, of policy and drafter.
        vocab: V, of policy and drafter.
        tokens: budget of rollout tokens in a step; as many whole rollouts as fit are used.
        rollout_length: tokens of each rollout.
        ttt: depths of training-time test.
        draft_vocab: of the drafter, when it is smaller.
        head_dim: of attention, whose query heads together are as wide as H.
        key_value_heads: as many as query heads when absent.
        intermediate: width of the MLP; 4H when absent.
    """

    hidden: int
    vocab: int
    tokens: int
    rollout_length: int
    ttt: int
    draft_vocab: int | None = None
    head_dim: int = 32
    key_value_heads: int | None = None
    intermediate: int | None = None

    @property
    def name(self) -> str:
        return f"h{self.hidden}-v{self.vocab}-t{self.tokens}-r{self.rollout_length}-d{self.ttt}"

    @property
    def rollouts(self) -> int:
        return self.tokens // self.rollout_length

    @property
    def step_tokens(self) -> int:
        """Rollout tokens really in a step."""
        return self.rollouts * self.rollout_length

    @property
    def draft_ids(self) -> torch.Tensor | None:
        """int64 [draft_vocab], ascending: the draft vocabulary, spread over the policy's."""
        if self.draft_vocab is None:
            return None
        return torch.arange(self.draft_vocab) * (self.vocab // self.draft_vocab)

    @property
    def apart(self) -> bool:
        """Whether contenders take their turns alone: on a GPU, whose memory is the measure, or
        where two models are too much for this machine."""
        return DEVICE.type == "cuda" or self.hidden >= 4096


GRID = tuple(
    Cell(hidden, vocab, tokens, rollout_length, ttt)
    for (hidden, vocab), tokens, rollout_length, ttt in itertools.product(
        ((256, 512), (512, 32768)), (2048, 8192), (160, 2048), (3, 7)
    )
)
SCALING = tuple(Cell(256, 512, tokens << 10, 160, 3) for tokens in (2, 8, 16, 32, 64))
QWEN3_8B = tuple(
    Cell(
        hidden=4096,
        vocab=151936,
        tokens=tokens,
        rollout_length=rollout_length,
        ttt=ttt,
        draft_vocab=32000,
        head_dim=128,
        key_value_heads=8,
        intermediate=12288,
    )
    for tokens, rollout_length, ttt in itertools.product((2048, 16384), (512, 2048), (3, 7))
)


@dataclass(frozen=True)
class Workload:
    """What every contender trains on.

    Attributes:
        config: the policy's; the drafter is one Llama layer of the same sizes.
        rollouts: random tokens and features; all but the first token of each is drafted.
        head: embedding and lm_head, in the rollouts' dtype.
    """

    cell: Cell
    config: LlamaConfig
    layout: FeatureLayout
    rollouts: list[Rollout]
    head: PolicyHead


def make_workload(cell: Cell, precision: Precision, seed: int = 0) -> Workload:
    """Random data for `cell`, its features in the dtype an engine of that precision gives."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, precision)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    def rollout(index: int) -> Rollout:
        length = cell.rollout_length
        captured = torch.ones(length, dtype=torch.bool)
        captured[-1] = False  # nothing was computed on the last token
        return Rollout(
            rollout_id=str(index),
            group=str(index),
            tokens=torch.randint(cell.vocab, (length,), generator=generator, dtype=torch.int32),
            prompt_length=1,
            captured=captured,
            last_hidden=normal(length, cell.hidden),
            aux_hidden=normal(length, len(LAYER_IDS), cell.hidden),
            policy_version=0,
            drafter_version=None,
            temperature=1.0,
        )

    head = PolicyHead(
        policy_version=0,
        embed_tokens=normal(cell.vocab, cell.hidden),
        lm_head=normal(cell.vocab, cell.hidden) / cell.hidden**0.5,
        final_norm=torch.ones(cell.hidden, dtype=dtype),
        norm_eps=1e-6,
    )
    layout = FeatureLayout(LAYER_IDS, cell.hidden, last_hidden_normed=True, dtype=precision)
    rollouts = [rollout(index) for index in range(cell.rollouts)]
    return Workload(cell, policy_config(cell), layout, rollouts, head)


def policy_config(cell: Cell) -> LlamaConfig:
    """A Llama policy, which all contenders accept."""
    heads = cell.hidden // cell.head_dim
    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        hidden_size=cell.hidden,
        intermediate_size=cell.intermediate or 4 * cell.hidden,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=cell.key_value_heads or heads,
        head_dim=cell.head_dim,
        vocab_size=cell.vocab,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
    )
