"""Drafters other than eagle3: what the tap gives, and what a swap does to them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from engines import Rollouts, generate, greedy, make_engine, prompts, sampled, status
from safetensors.torch import load_file, save_file
from test_vllm_swap import drafter_of, drafts, policy_weights, swap
from test_vllm_tap import assert_close, assert_mostly_captured
from tiny_models import (
    HIDDEN,
    INNER,
    MAX_LENGTH,
    VOCAB,
    load_policy,
    make_causal,
    make_mimo,
    make_policy,
    mimo_head,
)
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM

from benchmarks.parity import in_own_process
from drafttrain.checkpoints.manifest import Kind, Manifest, TargetFingerprint
from drafttrain.checkpoints.registry import Registry
from drafttrain.checkpoints.verify import Verified
from drafttrain.integrations.vllm import swap as swap_module
from drafttrain.publishing import UNTRAINED, publish_folder
from drafttrain.rollouts.spool import SpoolReader

Tensors = dict[str, torch.Tensor]


@pytest.fixture(autouse=True)
def _only_the_worker_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a folder of these kinds must hold is checked in ``checkpoints``, and tested there."""

    def read(folder: Path, target: TargetFingerprint) -> Verified:
        config = json.loads((folder / "config.json").read_text())
        return Verified(config, load_file(folder / "model.safetensors"), Manifest.read(folder))

    monkeypatch.setattr(swap_module, "verify", read)
    monkeypatch.setattr(swap_module, "with_defaults", lambda config, *_: config)


def add_version(registry: Registry, kind: Kind, policy: Path, like: Path, tensors: Tensors) -> int:
    version = max(registry.versions(), default=0) + 1
    folder = registry.root / registry.name / f"v{version:06d}"
    make_causal(folder, tensors, like)
    manifest = Manifest(
        name=registry.name, version=version, kind=kind, parent=None, created_at="", code="",
        target=TargetFingerprint.from_folder(policy), layer_ids=[],
        files={"config.json": "", "model.safetensors": f"{version:064x}"},
        tensors={}, lineage=UNTRAINED, acceptance=None,
    )  # fmt: skip
    (folder / "manifest.json").write_text(manifest.to_json())
    return version


def assert_last_states_are_the_policys(rollouts: list[Any], reference: Any) -> None:
    for rollout in rollouts:
        assert_mostly_captured(rollout)
        assert rollout.aux_hidden is None
        states = reference.model(rollout.tokens.long()[None]).last_hidden_state[0]
        rows = rollout.captured
        assert_close(rollout.last_hidden[rows], states[rows])


class Kinds:
    """An engine whose drafter is a small causal model or an MTP head, and how it is described."""

    def __init__(self, kind: Kind, folder: Path) -> None:
        self.kind: Kind = kind
        self.spool = folder / "spool"
        self.registry = Registry(folder / "registry")
        if kind == "mtp":
            self.policy = make_mimo(folder / "mimo")
            self.like = self.policy
            self.versions: list[Tensors] = [mimo_head(seed) for seed in (5, 6)]
        else:
            self.policy = make_policy(folder / "policy")
            self.like = make_policy(folder / "small", seed=3)
            # The last one is the policy itself, which accepts all of its own greedy tokens.
            folders = (self.like, self.policy)
            self.versions = [load_file(f / "model.safetensors") for f in folders]
        for tensors in self.versions:
            add_version(self.registry, kind, self.policy, self.like, tensors)
        speculative: dict[str, Any] = {"method": kind, "num_speculative_tokens": 3}
        if kind == "draft_model":
            speculative["model"] = str(self.like)
        self.llm = make_engine(
            self.policy,
            None,
            {"spool": str(self.spool), "registry": str(self.registry.root), "engine": kind},
            speculative_config=speculative,
        )
        self.plain = make_engine(self.policy, None, None)


@pytest.fixture(scope="module", params=["draft_model", "mtp"])
def kinds(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Kinds:
    with torch.no_grad():
        return Kinds(request.param, tmp_path_factory.mktemp(request.param))


def test_rows_are_the_last_states(kinds: Kinds) -> None:
    new, batch = Rollouts(kinds.spool), prompts([5, 70, 33, 100], salt=60)
    completions = generate(kinds.llm, batch, sampled(0.8, 20))
    rollouts = new.wait_for(4)
    assert sorted(r.tokens.tolist() for r in rollouts) == sorted(
        prompt + completion for prompt, completion in zip(batch, completions, strict=True)
    )
    (path,) = SpoolReader(kinds.spool).segment_paths()
    layout = SpoolReader(kinds.spool).read(path).layout
    assert layout.layer_ids == ()
    if kinds.kind == "mtp":  # MiMo hands over its state before the final norm
        assert not layout.last_hidden_normed
        return
    assert layout.last_hidden_normed
    assert_last_states_are_the_policys(rollouts, load_policy(kinds.policy))


def test_mimo_rows_before_the_norm(kinds: Kinds, tmp_path: Path) -> None:
    if kinds.kind != "mtp":
        pytest.skip("of MiMo")
    trunk = tmp_path / "trunk"
    document = json.loads((kinds.policy / "config.json").read_text())
    tensors = load_file(kinds.policy / "model.safetensors")
    trunk.mkdir()
    (trunk / "config.json").write_text(
        json.dumps(document | {"architectures": ["Qwen2ForCausalLM"]})
    )
    save_file({n: t for n, t in tensors.items() if "mtp_layers" not in n},
              trunk / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    reference = load_policy(trunk)
    seen: list[torch.Tensor] = []
    reference.model.norm.register_forward_pre_hook(lambda _, states: seen.append(states[0][0]))
    new = Rollouts(kinds.spool)
    generate(kinds.llm, prompts([9, 40], salt=61), sampled(0.8, 12))
    for rollout in new.wait_for(2):
        reference(rollout.tokens.long()[None])
        rows = rollout.captured
        assert_mostly_captured(rollout)
        assert_close(rollout.last_hidden[rows], seen[-1][rows])


def test_a_swap_changes_drafts_and_not_outputs(kinds: Kinds) -> None:
    batch = prompts([8, 21, 40], salt=62)
    expected = generate(kinds.plain, batch, greedy(30))
    before, seen = policy_weights(kinds.llm), []
    pointers = {n: p.data_ptr() for n, p in drafter_of(kinds.llm).named_parameters()}
    for version in (1, 2, 1, 2):
        reply = swap(kinds.llm, version)
        assert reply["version"] == version, reply
        seen.append(drafts(kinds.llm, 63))
        assert generate(kinds.llm, batch, greedy(30)) == expected
    assert seen[0] == seen[2]
    assert seen[1] == seen[3]
    assert seen[0] != seen[1]
    after = policy_weights(kinds.llm)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert {n: p.data_ptr() for n, p in drafter_of(kinds.llm).named_parameters()} == pointers
    if kinds.kind == "draft_model":
        counts = {v.drafter_version: v for v in status(kinds.llm).acceptance_by_version}
        assert counts[2].accepted > 0.8 * counts[2].drafted  # it is the policy
        assert counts[1].accepted < 0.5 * counts[1].drafted


def test_what_does_not_fit_is_refused(kinds: Kinds) -> None:
    swap(kinds.llm, 1)
    expected = drafts(kinds.llm, 64)
    sound = kinds.versions[0]
    projection = next(name for name in sound if name.endswith("q_proj.weight"))
    embedding = {"model.embed_tokens.weight": torch.zeros(128, 64)}
    cases = {
        "qkv_proj": sound | {projection: torch.zeros(32, 64)},
        "missing" if kinds.kind == "mtp" else "qkv_proj.weight": {
            n: t for n, t in sound.items() if ".self_attn." not in n
        },
        "no such tensor": sound | {"model.layers.99.mlp.up_proj.weight": torch.zeros(8, 8)},
    }
    if kinds.kind == "mtp":
        cases["shared with the policy"] = sound | embedding
    for reason, tensors in cases.items():
        version = add_version(kinds.registry, kinds.kind, kinds.policy, kinds.like, tensors)
        reply = swap(kinds.llm, version)
        assert reply.get("status") == 422, reply
        assert reason in reply["error"]
    assert status(kinds.llm).drafter_version == 1
    assert drafts(kinds.llm, 64) == expected


def test_a_tensor_that_never_comes_restores_the_old_drafter(
    kinds: Kinds, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a family whose names only its own loader knows: found out when all are loaded."""
    swap(kinds.llm, 2)
    expected = drafts(kinds.llm, 65)
    partial = {n: t for n, t in kinds.versions[0].items() if not n.endswith("k_proj.weight")}
    version = add_version(kinds.registry, kinds.kind, kinds.policy, kinds.like, partial)
    monkeypatch.setattr(swap_module, "check_tensors", lambda *args, **more: None)
    reply = swap(kinds.llm, version)
    assert reply["status"] == 409
    assert "values came; version 2 is restored" in reply["error"]
    assert drafts(kinds.llm, 65) == expected


def test_a_model_that_runs_by_way_of_transformers_swaps(tmp_path: Path) -> None:
    """Its modules keep frequencies that no checkpoint has."""
    first, second, again = in_own_process(drafts_of_gpt_neox, tmp_path)
    assert first == again
    assert first != second


def drafts_of_gpt_neox(folder: Path) -> list[list[list[int]]]:
    """Those of version 1, which the engine started with, of version 2 and of version 1 again.

    In a process of its own: vLLM changes transformers' class when an engine runs it.
    """
    policy, registry = make_policy(folder / "policy"), Registry(folder / "registry")
    for seed in (1, 2):
        torch.manual_seed(seed)
        config = GPTNeoXConfig(
            vocab_size=VOCAB,
            hidden_size=HIDDEN,
            intermediate_size=INNER,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=MAX_LENGTH,
            bos_token_id=0,
            eos_token_id=1,
        )
        GPTNeoXForCausalLM(config).save_pretrained(folder / f"draft-{seed}")
        publish_folder(folder / f"draft-{seed}", policy, registry)
    speculative = {"method": "draft_model"}
    settings = {"registry": str(registry.root), "engine": "neox"}
    llm = make_engine(policy, registry.folder(1), settings, speculative_config=speculative)
    seen = [drafts(llm, 67)]
    for version in (2, 1):
        reply = swap(llm, version)
        assert reply.get("version") == version, reply
        seen.append(drafts(llm, 67))
    return seen


# An engine of its own process: numba, which ngram drafting compiles with, breaks the start of every
# later engine in the same one (vLLM 0.32, ``triton_utils/dispatcher.py``).
NGRAM = """
import json, sys
import conftest
from engines import generate, make_engine, sampled, status

policy, spool, registry, prompt = json.loads(sys.argv[1])
llm = make_engine(
    policy,
    None,
    {"spool": spool, "registry": registry, "engine": "ngram"},
    speculative_config={
        "method": "ngram", "num_speculative_tokens": 3,
        "prompt_lookup_max": 2, "prompt_lookup_min": 1,
    },
)
completions = generate(llm, [prompt], sampled(0.3, 60))
(refusal,) = llm.collective_rpc("drafttrain_swap", args=(1,))
now = status(llm)
print(json.dumps([completions[0], refusal, now.method, now.drafter_version]))
"""


def test_ngram_drafts_are_captured_and_not_swapped(
    policy: Path, reference: Any, registry: Registry, tmp_path: Path
) -> None:
    prompt = prompts([12], salt=66)[0] * 3
    given = json.dumps([str(policy), str(tmp_path), str(registry.root), prompt])
    environment = os.environ | {"PYTHONPATH": f"{Path(__file__).parent}:{os.getcwd()}"}
    done = subprocess.run(
        [sys.executable, "-c", NGRAM, given],
        capture_output=True, text=True, env=environment, timeout=120, check=True,
    )  # fmt: skip
    completion, refusal, method, version = json.loads(done.stdout.splitlines()[-1])
    (path,) = SpoolReader(tmp_path).segment_paths()
    (rollout,) = SpoolReader(tmp_path).read(path).rollouts
    assert rollout.tokens.tolist() == prompt + completion
    assert rollout.rounds > 0
    assert_last_states_are_the_policys([rollout], reference)
    assert (method, version) == ("ngram", None)
    assert "drafts with ngram" in refusal["error"]
