"""An engine as the teacher: what transformers computes, and enough to train a drafter from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import VOCAB, make_granite, make_policy

from drafttrain.errors import CheckpointError
from drafttrain.integrations.vllm.teacher import EngineTeacher
from drafttrain.rollouts.sources.samples import Facts, SavedRollout
from drafttrain.training.teacher import TransformersTeacher


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_policy(tmp_path_factory.mktemp("policy"))


def saved(lengths: list[int]) -> list[SavedRollout]:
    generator = torch.Generator().manual_seed(0)
    return [
        SavedRollout(
            torch.randint(2, VOCAB, (length,), generator=generator, dtype=torch.int32),
            torch.arange(length) >= min(2, length - 1),
            Facts(str(index), group=str(index)),
        )
        for index, length in enumerate(lengths)
    ]


@pytest.mark.parametrize("layer_ids", [(1, 2, 3), ()])
def test_its_features_are_those_of_transformers(policy: Path, layer_ids: tuple[int, ...]) -> None:
    # More than the engine's step takes at once, one twice, and the shortest there can be.
    rollouts = saved([90, 7, 2, 1, 64, 33])
    rollouts.append(rollouts[1])
    engine = EngineTeacher(
        policy, layer_ids, longest=90, options={"max_num_batched_tokens": 64, "max_num_seqs": 16}
    )
    reference = TransformersTeacher(policy, layer_ids)
    assert engine.layout == reference.layout
    assert engine.bytes_per_token == reference.bytes_per_token
    assert torch.equal(engine.head.lm_head, reference.head.lm_head)
    assert torch.equal(engine.head.embed_tokens, reference.head.embed_tokens)
    pairs = zip(engine.features(rollouts), reference.features(rollouts), strict=True)
    for found, expected in pairs:
        assert found.rollout_id == expected.rollout_id
        assert torch.equal(found.tokens, expected.tokens)
        assert torch.equal(found.captured, expected.captured)
        rows = expected.captured
        torch.testing.assert_close(
            found.last_hidden[rows], expected.last_hidden[rows], rtol=1e-5, atol=1e-5
        )
        assert (found.aux_hidden is None) == (not layer_ids)
        if found.aux_hidden is not None and expected.aux_hidden is not None:
            torch.testing.assert_close(
                found.aux_hidden[rows], expected.aux_hidden[rows], rtol=1e-5, atol=1e-5
            )
    engine.close()


def test_a_policy_that_scales_its_logits_is_refused(tmp_path: Path) -> None:
    policy = make_granite(tmp_path)
    with pytest.raises(CheckpointError, match=r"scale 0\.125"):
        EngineTeacher(policy, (), longest=20)
    with pytest.raises(CheckpointError, match="lm_head"):
        TransformersTeacher(policy, ())


def test_pretrain_streams_from_an_engine(policy: Path, tmp_path: Path) -> None:
    rows = [
        {"prompt_token_ids": r.tokens[:4].tolist(), "completion_token_ids": r.tokens[4:].tolist()}
        for r in saved([20 + index for index in range(24)])
    ]
    (tmp_path / "rollouts.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def drafttrain(*arguments: str) -> str:
        command = [sys.executable, "-m", "drafttrain", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    drafttrain("init", "--target", str(policy), "--out", "drafter")
    reports = {}
    for teacher in ("vllm", "transformers"):
        printed = drafttrain(
            *("pretrain", "--target", str(policy), "--rollouts", "rollouts.jsonl"),
            *("--drafter", "drafter", "--registry", f"registry-{teacher}", "--teacher", teacher),
            *("--steps", "2", "--tokens-per-step", "128", "--microbatch-tokens", "128"),
            *("--out", f"out-{teacher}", "--json"),
        )  # fmt: skip
        reports[teacher] = json.loads(printed.splitlines()[-1])
    lengths = [report["acceptance_length"] for report in reports.values()]
    assert lengths[0] == pytest.approx(lengths[1], abs=1e-3)
