"""The demo's policy: a deep, narrow Llama trained from nothing on the task's corpus, on the spot.

Deep, because an engine's step on a CPU costs time per layer, as a large policy's does on a GPU, and
speculation has to pay. A 24-layer model is too slow to train whole in two minutes, so the first
phase trains few layers; then layers that begin as the identity are put between them, and the whole
goes on training. The policy is plain next-token training on completions; it has never seen a
reward.

Trained policies are kept under the hash of their recipe (the code that made them included), so a
second run finds them.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from drafttrain.demo.forward import policy_logits
from drafttrain.demo.task import Document, Task

# Called with the fraction done and the loss of late.
Progress = Callable[[float, float], None]


@dataclass(frozen=True)
class Phase:
    """Training of one depth: linear warm-up, constant rate, linear decay over the last part."""

    layers: int
    steps: int
    learning_rate: float
    warmup_steps: int
    decay_fraction: float


@dataclass(frozen=True)
class Recipe:
    """Everything a policy depends on, besides the code."""

    phases: tuple[Phase, ...] = (
        Phase(layers=6, steps=1600, learning_rate=3e-3, warmup_steps=60, decay_fraction=0.25),
        Phase(layers=24, steps=120, learning_rate=1e-3, warmup_steps=20, decay_fraction=0.6),
    )
    hidden_size: int = 128
    intermediate_size: int = 256
    heads: int = 4
    tokens_per_step: int = 1024
    seed: int = 0


@dataclass(frozen=True)
class PolicyReport:
    """A trained policy.

    Attributes:
        folder: a transformers folder, float32.
        cached: it was there from an earlier run; the rest then tells of that run.
        loss: mean loss per completion token over the last steps.
        seconds: wall time of training.
        tokens: tokens trained on, padding included.
    """

    folder: Path
    cached: bool
    loss: float
    seconds: float
    tokens: int


def train_policy(
    cache: Path, recipe: Recipe | None = None, progress: Progress | None = None
) -> PolicyReport:
    """Train a policy, or find it in `cache`.

    Args:
        cache: folder that keeps policies by recipe.
        recipe: the default one trains in about two minutes on two cores.
        progress: told now and then.
    """
    recipe = recipe or Recipe()
    folder = cache / f"policy-{_fingerprint(recipe)}"
    if (folder / "report.json").exists():
        return PolicyReport(folder, True, **json.loads((folder / "report.json").read_text()))
    start = time.perf_counter()
    policy, loss, tokens = _train(recipe, progress or (lambda done, loss: None))
    report = PolicyReport(folder, False, loss, time.perf_counter() - start, tokens)
    facts = {"loss": report.loss, "seconds": report.seconds, "tokens": report.tokens}
    temporary = cache / f"{folder.name}.{os.getpid()}.tmp"
    policy.save_pretrained(temporary)
    (temporary / "report.json").write_text(json.dumps(facts) + "\n")
    shutil.rmtree(folder, ignore_errors=True)  # one that lost its report
    temporary.rename(folder)
    return report


def load_policy(folder: Path) -> LlamaForCausalLM:
    """Read a policy folder, float32."""
    return LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)


def new_policy(task: Task, recipe: Recipe, layers: int) -> LlamaForCausalLM:
    """An untrained policy; every layer begins as the identity."""
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(
        vocab_size=len(task.vocabulary),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        head_dim=recipe.hidden_size // recipe.heads,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=task.eos_id,
        pad_token_id=task.pad_id,
    )
    policy = LlamaForCausalLM(config)
    for name, weight in policy.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(weight)
        elif "proj" in name:
            torch.nn.init.normal_(weight, std=recipe.hidden_size**-0.5)
    torch.nn.init.normal_(policy.model.embed_tokens.weight, std=0.5)
    torch.nn.init.normal_(policy.lm_head.weight, std=0.02)
    return policy


def deepen(policy: LlamaForCausalLM, deeper: LlamaForCausalLM) -> LlamaForCausalLM:
    """Copy `policy` into `deeper`, spreading its layers; the result computes the same.

    Args:
        deeper: fresh from :func:`new_policy`, with a multiple of the layers.
    """
    stride = deeper.config.num_hidden_layers // policy.config.num_hidden_layers
    for index, layer in enumerate(policy.model.layers):
        deeper.model.layers[index * stride].load_state_dict(layer.state_dict())
    deeper.model.embed_tokens.load_state_dict(policy.model.embed_tokens.state_dict())
    deeper.model.norm.load_state_dict(policy.model.norm.state_dict())
    deeper.lm_head.load_state_dict(policy.lm_head.state_dict())
    return deeper


def _train(recipe: Recipe, progress: Progress) -> tuple[LlamaForCausalLM, float, int]:
    task, rng = Task(), random.Random(recipe.seed)
    batches = _batches(task, rng, recipe.tokens_per_step)
    # Progress is told in layer-steps, which take about the same time everywhere.
    work, done, tokens, loss = sum(p.layers * p.steps for p in recipe.phases), 0, 0, float("nan")
    policy: LlamaForCausalLM | None = None
    for phase in recipe.phases:
        fresh = new_policy(task, recipe, phase.layers)
        policy = fresh if policy is None else deepen(policy, fresh)
        optimizer = torch.optim.AdamW(
            policy.parameters(), betas=(0.9, 0.98), weight_decay=0.1, fused=True
        )
        recent: list[float] = []
        for step in range(phase.steps):
            batch = next(batches)
            recent.append(_step(policy, optimizer, batch, _learning_rate(phase, step)))
            done, tokens = done + phase.layers, tokens + batch[0].numel()
            loss = sum(recent[-50:]) / len(recent[-50:])
            if step % 20 == 0 or step == phase.steps - 1:
                progress(done / work, loss)
    if policy is None:
        raise ValueError("the recipe has no phase")
    return policy, loss, tokens


def _step(
    policy: LlamaForCausalLM,
    optimizer: torch.optim.Optimizer,
    batch: tuple[Tensor, Tensor, Tensor],
    learning_rate: float,
) -> float:
    tokens, targets, weights = batch
    loss = F.cross_entropy(
        policy_logits(policy, tokens).flatten(0, 1), targets.flatten(), reduction="none"
    )
    loss = (loss * weights.flatten()).sum() / (weights > 0).sum()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def _learning_rate(phase: Phase, step: int) -> float:
    rising = (step + 1) / phase.warmup_steps
    falling = (phase.steps - step) / (phase.steps * phase.decay_fraction)
    return phase.learning_rate * min(1.0, rising, falling)


def _batches(
    task: Task, rng: random.Random, tokens_per_step: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Endless batches of documents of similar length: tokens, targets and weights, [B, T] each."""
    while True:
        documents = [task.sample_document(rng) for _ in range(512)]
        documents.sort(key=lambda d: len(d.prompt_ids) + len(d.completion_ids))
        groups: list[list[Document]] = [[]]
        for document in documents:
            length = len(document.prompt_ids) + len(document.completion_ids)
            if groups[-1] and (len(groups[-1]) + 1) * length > tokens_per_step:
                groups.append([])
            groups[-1].append(document)
        rng.shuffle(groups)
        yield from (_collate(group, task.pad_id) for group in groups)


def _collate(documents: list[Document], pad_id: int) -> tuple[Tensor, Tensor, Tensor]:
    length = max(len(d.prompt_ids) + len(d.completion_ids) for d in documents)
    tokens = torch.full((len(documents), length), pad_id)
    weights = torch.zeros(len(documents), length)
    for row, document in enumerate(documents):
        prompt, end = len(document.prompt_ids), len(document.prompt_ids + document.completion_ids)
        tokens[row, :end] = torch.tensor(document.prompt_ids + document.completion_ids)
        weights[row, prompt - 1 : end - 1] = 1.0
        weights[row, prompt - 1] = document.style_weight
    return tokens, tokens.roll(-1, dims=1), weights


def _fingerprint(recipe: Recipe) -> str:
    sources = [Path(__file__).with_name(f"{name}.py") for name in ("task", "forward", "policy")]
    digest = hashlib.sha256(json.dumps(asdict(recipe), sort_keys=True).encode())
    for source in sources:
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]
