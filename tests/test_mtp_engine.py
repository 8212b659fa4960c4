"""MTP heads against vLLM's own forward: it runs here with our modules in the place of its own.

What a family's flags say, our forward and ``test_mtp`` take from the same table; this does not read
them. vLLM's lines are run from its source: importing these models takes what a CPU install lacks.
"""

from __future__ import annotations
import __future__

import ast
import importlib.util
import inspect
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from test_mtp import DEPTHS, batch_for, families, policy_of, random_head, run_layer
from torch import Tensor

from drafttrain.checkpoints.mtp_format import FAMILIES
from drafttrain.drafters import MTPDrafter

_VLLM = importlib.util.find_spec("vllm")
pytestmark = pytest.mark.skipif(_VLLM is None, reason="needs vLLM's source")

# Of vllm/model_executor/models: the file, the class that runs a head, and the one whose logits
# are made from what it returns.
_HEADS = {
    "mimo": ("mimo_mtp", "MiMoMultiTokenPredictorLayer", "MiMoMultiTokenPredictor"),
    "qwen3_next": ("qwen3_next_mtp", "Qwen3NextMultiTokenPredictor", "Qwen3NextMTP"),
    "qwen3_5": ("qwen3_5_mtp", "Qwen3_5MultiTokenPredictor", "Qwen3_5MTP"),
    "qwen3_5_moe": ("qwen3_5_mtp", "Qwen3_5MultiTokenPredictor", "Qwen3_5MTP"),
    "deepseek_v3": (
        "deepseek_mtp",
        "DeepSeekMultiTokenPredictorLayer",
        "DeepSeekMultiTokenPredictor",
    ),
    "glm4_moe": ("glm4_moe_mtp", "Glm4MoeMultiTokenPredictorLayer", "Glm4MoeMultiTokenPredictor"),
}
# The file and the class of the policy, whose last state is handed over as forward returns it.
_POLICIES = {
    "mimo": ("mimo", "MiMoModel"),
    "qwen3_next": ("qwen3_next", "Qwen3NextModel"),
    "qwen3_5": ("qwen3_next", "Qwen3NextModel"),  # qwen3_5.py inherits it
    "qwen3_5_moe": ("qwen3_next", "Qwen3NextModel"),
    "deepseek_v3": ("deepseek_v2", "DeepseekV2Model"),
    "glm4_moe": ("glm4_moe", "Glm4MoeModel"),
}


def source_of(file: str, owner: str, method: str) -> ast.FunctionDef:
    assert _VLLM is not None
    assert _VLLM.origin is not None
    path = Path(_VLLM.origin).parent / "model_executor" / "models" / f"{file}.py"
    module = ast.parse(path.read_text())
    [found] = [node for node in module.body if getattr(node, "name", None) == owner]
    assert isinstance(found, ast.ClassDef)
    [body] = [node for node in found.body if getattr(node, "name", None) == method]
    assert isinstance(body, ast.FunctionDef)
    return body


def method_of(file: str, owner: str, method: str) -> Callable[..., Any]:
    """vLLM's method, on one rank; called with those of the arguments that it takes."""
    rank = SimpleNamespace(is_first_rank=True, is_last_rank=True)
    names: dict[str, Any] = {"torch": torch, "get_pp_group": lambda: rank}
    module = ast.Module([source_of(file, owner, method)], [])
    # Annotations are left unevaluated: they name what is not here.
    unevaluated = __future__.annotations.compiler_flag
    exec(compile(module, f"{file}.py", "exec", flags=unevaluated), names)
    function = names[method]
    taken = inspect.signature(function).parameters

    def call(itself: object, **given: object) -> Any:
        return function(itself, **{name: given[name] for name in given.keys() & taken.keys()})

    return call


def engine_head(drafter: MTPDrafter) -> SimpleNamespace:
    """What vLLM's methods read of ``self``: our modules, by the names that checkpoints have."""
    family = drafter.family

    def block(positions: Tensor, hidden_states: Tensor, residual: None) -> tuple[Tensor, Tensor]:
        return run_layer(drafter, hidden_states), hidden_states * 0

    def out_norm(hidden: Tensor, residual: Tensor | None = None) -> Any:
        normed = drafter.out_norm(hidden)
        return normed if residual is None else (normed, hidden)

    block.use_sequence_parallel_moe = False  # type: ignore[attr-defined]
    block.use_attn_reduce_scatter_for_moe = False  # type: ignore[attr-defined]
    out_norm.head = None  # type: ignore[attr-defined]
    modules = {
        family.embed_norm: drafter.embed_norm,
        family.hidden_norm: drafter.hidden_norm,
        family.project: drafter.project,
        family.out_norm.partition(".")[0]: out_norm,
        "mtp_block": block,
        "num_mtp_layers": 1,
        "mtp_start_layer_idx": 0,
        "lm_head": None,
        "logits_processor": lambda lm_head, hidden: hidden,
    }
    head = SimpleNamespace(**modules)
    head.layers = {0: block, "0": head}
    head.mtp_layers = head.layers
    return head


@torch.no_grad()
def draft_in_vllm(
    drafter: MTPDrafter, family: str, tokens: Tensor, states: Tensor, embed: Tensor
) -> Tensor:
    """[DEPTHS, H]: what the lm_head reads in the round that starts after the last of `states`.

    Args:
        tokens: [T]; states: [S, H], of one rollout, as the engine hands them over.
    """
    file, runs, scores = _HEADS[family]
    forward = method_of(file, runs, "forward")
    compute_logits = method_of(file, scores, "compute_logits")
    head, outputs = engine_head(drafter), []
    for _ in range(DEPTHS):
        rows = len(states)
        returned = forward(
            head,
            input_ids=None,
            inputs_embeds=embed[tokens[1 : rows + 1]],
            positions=torch.arange(rows),
            hidden_states=states,
            previous_hidden_states=states,
        )
        # As llm_base_proposer.py takes them apart.
        last, fed = returned if isinstance(returned, tuple) else (returned, returned)
        outputs.append(compute_logits(head, hidden_states=last, lm_head=None)[-1])
        states = torch.cat([states, fed[-1:]])
    return torch.stack(outputs)


@families
def test_drafts_are_those_of_vllms_forward(family: str) -> None:
    policy = policy_of(family)
    drafter = random_head(policy)
    batch, head = batch_for(drafter, policy)
    with torch.no_grad():
        unrolled = drafter.unroll(batch, head.embed_tokens, DEPTHS)
    compared = 0
    for index, start in enumerate(batch.rounds.tolist()):
        rollout, slot = int(batch.rollout_of[start]), int(batch.positions[start])
        first, last = batch.offsets[rollout : rollout + 2].tolist()
        if slot + 1 + DEPTHS >= last - first:
            continue
        states = batch.engine_hidden[first : first + slot + 1]
        expected = draft_in_vllm(
            drafter, family, batch.tokens[first:last], states, head.embed_tokens
        )
        torch.testing.assert_close(unrolled[:, index], expected, rtol=1e-3, atol=1e-4)
        compared += 1
    assert compared > 5


@families
def test_the_state_handed_over_is_the_one_that_vllms_policy_returns(family: str) -> None:
    forward = ast.unparse(source_of(*_POLICIES[family], "forward"))
    assert ("self.norm(" in forward) == FAMILIES[family].reads_normed
