"""Small policies, drafters and rollouts that tests make for themselves."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Qwen3Config

from drafttrain.drafters.batch import Batch
from drafttrain.drafters.eagle3 import Eagle3Drafter
from drafttrain.drafters.policy import PolicyShape
from drafttrain.rollouts.record import FeatureLayout, PolicyHead, Rollout, prompt_group

LAYERS = (1, 2, 3)


def policy_shape(**changes: object) -> PolicyShape:
    """A four-layer Qwen3 policy, 32 wide, of 23 tokens."""
    settings = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 23,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
        "architectures": ["Qwen3ForCausalLM"],
    }
    return PolicyShape(Qwen3Config(**(settings | changes)))


def drafter(policy: PolicyShape, seed: int = 0) -> Eagle3Drafter:
    torch.manual_seed(seed)
    return Eagle3Drafter.initialise(policy, layer_ids=LAYERS)


def layout(policy: PolicyShape) -> FeatureLayout:
    return FeatureLayout(LAYERS, policy.hidden_size, last_hidden_normed=True, dtype="float32")


def policy_head(policy: PolicyShape, version: int = 0) -> PolicyHead:
    generator = torch.Generator().manual_seed(version)
    size = (policy.vocab_size, policy.hidden_size)
    return PolicyHead(
        policy_version=version,
        embed_tokens=torch.randn(size, generator=generator),
        lm_head=torch.randn(size, generator=generator),
        final_norm=torch.ones(policy.hidden_size),
        norm_eps=1e-6,
    )


def rollouts(policy: PolicyShape, count: int, seed: int = 0, version: int = 0) -> list[Rollout]:
    """Rollouts of a toy policy whose last hidden state points at the next token's head row.

    The next token is a fixed function of the current one most of the time, so a drafter can learn
    it; features are noisy images of the current token.
    """
    generator = torch.Generator().manual_seed(seed)
    head = policy_head(policy, version)
    return [_rollout(policy, head, f"r{seed}-{i}", generator, version) for i in range(count)]


def _rollout(
    policy: PolicyShape, head: PolicyHead, name: str, generator: torch.Generator, version: int
) -> Rollout:
    vocab, hidden = policy.vocab_size, policy.hidden_size
    length = int(torch.randint(14, 24, (), generator=generator))
    tokens = [int(torch.randint(vocab, (), generator=generator))]
    last_hidden = torch.zeros(length, hidden)
    for position in range(length - 1):
        last_hidden[position] = 0.3 * head.lm_head[(3 * tokens[-1] + 1) % vocab]
        p = (head.lm_head @ last_hidden[position]).softmax(-1)
        tokens.append(int(torch.multinomial(p, 1, generator=generator)))
    noise = 0.1 * torch.randn(length, len(LAYERS), hidden, generator=generator)
    captured = torch.ones(length, dtype=torch.bool)
    captured[-1] = False
    return Rollout(
        rollout_id=name,
        group=prompt_group(tokens[:2]),
        tokens=torch.tensor(tokens, dtype=torch.int32),
        prompt_length=2,
        captured=captured,
        last_hidden=last_hidden,
        aux_hidden=head.embed_tokens[torch.tensor(tokens)][:, None] + noise,
        policy_version=version,
        drafter_version=None,
        temperature=1.0,
        finish_reason="stop",
    )


def bare_batch(prompts: list[int], lengths: list[int]) -> Batch:
    """Rollouts of those lengths, prompts included, without features."""
    total = sum(lengths)
    return Batch(
        tokens=torch.zeros(total, dtype=torch.int64),
        offsets=torch.tensor([0, *lengths]).cumsum(0),
        captured=torch.ones(total, dtype=torch.bool),
        last_hidden=torch.zeros(total, 1),
        aux_hidden=None,
        prompt_lengths=torch.tensor(prompts),
        temperatures=torch.ones(len(lengths)),
    )


def write_tensors(folder: Path, tensors: dict[str, Tensor]) -> None:
    """In place of a drafter folder's own."""
    save_file(tensors, folder / "model.safetensors")
