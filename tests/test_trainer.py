"""The trainer learns, resumes exactly, and refuses what it cannot continue from."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import making
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.swa_utils import AveragedModel

from drafttrain.config import TrainingConfig
from drafttrain.control.acceptance import estimate_acceptance
from drafttrain.drafters import KINDS, DraftModel
from drafttrain.errors import CheckpointError, RolloutError
from drafttrain.rollouts.record import Rollout
from drafttrain.training.devices import Devices, whole
from drafttrain.training.trainer import StepReport, Trainer

POLICY = making.policy_shape()
LAYOUT = making.layout(POLICY)
CONFIG = TrainingConfig(draft_tokens=3, learning_rate=3e-3, warmup_steps=5)


def heads(*versions: int) -> dict[int, object]:
    return {version: making.policy_head(POLICY, version) for version in versions}


def take_steps(trainer: Trainer, count: int, first_seed: int) -> list[float]:
    return [
        trainer.step(making.rollouts(POLICY, 6, seed=first_seed + i), LAYOUT, heads(0)).loss
        for i in range(count)
    ]


def test_training_raises_acceptance_on_held_out_rollouts() -> None:
    held_out = making.rollouts(POLICY, 24, seed=999)
    drafter = making.drafter(POLICY)
    before = estimate_acceptance(drafter, held_out, LAYOUT, heads(0), k=3).acceptance_length
    take_steps(Trainer(drafter, CONFIG), 60, first_seed=0)
    after = estimate_acceptance(drafter, held_out, LAYOUT, heads(0), k=3).acceptance_length
    assert after > before + 0.5


def test_resume_is_exact(tmp_path: Path) -> None:
    straight = Trainer(making.drafter(POLICY), CONFIG)
    take_steps(straight, 3, first_seed=0)
    straight.save(tmp_path, note="here")
    expected = take_steps(straight, 3, first_seed=3)

    resumed = Trainer(making.drafter(POLICY, seed=7), CONFIG)
    assert resumed.restore(tmp_path) == {"note": "here"}
    assert take_steps(resumed, 3, first_seed=3) == expected
    assert resumed.step_count == straight.step_count
    assert torch.equal(resumed.generator.get_state(), straight.generator.get_state())
    for ours, theirs in ((straight.drafter, resumed.drafter), (straight.average, resumed.average)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name


def tied_model(seed: int = 0) -> DraftModel:
    torch.manual_seed(seed)
    return DraftModel.initialise(making.policy_shape(tie_word_embeddings=True), layers=2)


def test_a_save_clears_what_killed_ones_left(tmp_path: Path) -> None:
    for left in ("trainer.safetensors.tmp", ".tmpa1B2c3"):
        (tmp_path / left).write_bytes(b"half")
    Trainer(making.drafter(POLICY), CONFIG).save(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["trainer.safetensors"]


def test_a_tied_head_is_saved_once_and_resumed_exactly(tmp_path: Path) -> None:
    straight = Trainer(tied_model(), CONFIG)
    take_steps(straight, 2, first_seed=0)
    straight.save(tmp_path)
    saved = load_file(tmp_path / "trainer.safetensors")
    assert not [name for name in saved if "lm_head" in name]
    expected = take_steps(straight, 2, first_seed=2)

    resumed = Trainer(tied_model(seed=7), CONFIG)
    resumed.restore(tmp_path)
    assert take_steps(resumed, 2, first_seed=2) == expected
    for ours, theirs in ((straight.drafter, resumed.drafter), (straight.average, resumed.average)):
        for name, tensor in ours.state_dict().items():
            assert torch.equal(tensor, theirs.state_dict()[name]), name


def test_a_frozen_tied_head_stays_and_so_does_the_embedding() -> None:
    drafter = tied_model()
    before = {name: tensor.clone() for name, tensor in drafter.state_dict().items()}
    config = CONFIG.model_copy(update={"train_head": False, "weight_decay": 0.1})
    take_steps(Trainer(drafter, config), 1, first_seed=0)
    moved = {n for n, tensor in drafter.state_dict().items() if not torch.equal(tensor, before[n])}
    assert moved
    assert not moved & {"model.lm_head.weight", "model.model.embed_tokens.weight"}


@pytest.fixture
def devices() -> Iterator[Devices]:
    """One process that behaves as one of several: what it shares, it shares with itself."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    devices = Devices()
    devices.count = 2
    yield devices
    torch.distributed.destroy_process_group()


def test_a_frozen_head_does_not_decay_in_company(devices: Devices) -> None:
    drafter = making.drafter(POLICY)
    before = drafter.lm_head.weight.detach().clone()
    config = CONFIG.model_copy(update={"train_head": False, "weight_decay": 0.1})
    take_steps(Trainer(drafter, config, devices=devices), 1, first_seed=0)
    assert torch.equal(drafter.lm_head.weight, before)


def test_low_rank_additions_that_are_divided_resume_exactly(
    devices: Devices, tmp_path: Path
) -> None:
    devices.count, devices.sharded = 1, True

    def trainer(seed: int) -> Trainer:
        torch.manual_seed(seed)
        config = CONFIG.model_copy(update={"lora_rank": 2})
        return Trainer(DraftModel.initialise(POLICY, layers=2), config, devices=devices)

    straight = trainer(0)
    take_steps(straight, 2, first_seed=0)
    straight.save(tmp_path)
    expected = take_steps(straight, 2, first_seed=2)
    resumed = trainer(7)
    resumed.restore(tmp_path)
    assert take_steps(resumed, 2, first_seed=2) == expected
    for name, tensor in straight.average.state_dict().items():
        assert torch.equal(whole(tensor), whole(resumed.average.state_dict()[name])), name


LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "original_max_position_embeddings": 20,
    "short_factor": [1.0] * 8,
    "long_factor": [4.0] * 8,
}


@pytest.mark.parametrize("kind", ["eagle3", "draft_model"])
@pytest.mark.parametrize("sharded", [False, True])
def test_a_drafter_with_longrope_trains(kind: str, sharded: bool, devices: Devices) -> None:
    devices.count, devices.sharded = 1, sharded
    policy = making.policy_shape(rope_parameters=LONGROPE)
    options = {"layer_ids": making.LAYERS} if kind == "eagle3" else {"layers": 2}
    trainer = Trainer(KINDS[kind].initialise(policy, **options), CONFIG, devices=devices)
    rollouts = sorted(making.rollouts(POLICY, 20), key=lambda rollout: rollout.length)
    for part in (rollouts[-2:], rollouts[:2], rollouts[-2:]):  # beyond the original length, within
        assert trainer.step(part, LAYOUT, heads(0)).grad_norm > 0
    assert trainer.step_count == 3


def test_the_average_is_saved_under_the_names_it_always_had(tmp_path: Path) -> None:
    drafter = making.drafter(POLICY)
    names = AveragedModel(drafter).state_dict().keys()
    Trainer(drafter, CONFIG).save(tmp_path)
    saved = load_file(tmp_path / "trainer.safetensors")
    assert {name for name in saved if name.startswith("average.")} == {
        f"average.{n}" for n in names
    }


def test_the_average_is_the_exponential_one_of_each_weight() -> None:
    trainer = Trainer(making.drafter(POLICY), CONFIG)
    expected: dict[str, torch.Tensor] = {}
    for seed in range(3):
        take_steps(trainer, 1, first_seed=seed)
        for name, weight in trainer.drafter.state_dict().items():
            before = expected.get(name, weight.clone())
            expected[name] = before.lerp(weight, 1 - CONFIG.average_decay)
    for name, weight in trainer.average.state_dict().items():
        torch.testing.assert_close(weight, expected[name], msg=name)
    assert not any(torch.equal(w, trainer.drafter.state_dict()[n]) for n, w in expected.items())


def test_rollouts_of_two_policy_versions_use_their_own_heads() -> None:
    old, new = making.rollouts(POLICY, 3, seed=1), making.rollouts(POLICY, 3, seed=2, version=1)
    mixed = Trainer(making.drafter(POLICY), CONFIG).step([*old, *new], LAYOUT, heads(0, 1))
    losses = [
        Trainer(making.drafter(POLICY), CONFIG).step(part, LAYOUT, heads(0, 1)).loss
        for part in (old, new)
    ]
    assert min(losses) < mixed.loss < max(losses)


def test_staler_rollouts_weigh_less() -> None:
    old, new = making.rollouts(POLICY, 3, seed=1), making.rollouts(POLICY, 3, seed=2, version=1)

    def norm(decay: float, rollouts: list[Rollout], newest: int | None = None) -> float:
        config = TrainingConfig(draft_tokens=3, staleness_decay=decay)
        trainer = Trainer(making.drafter(POLICY), config)
        return trainer.step(rollouts, LAYOUT, heads(0, 1), newest).grad_norm

    assert norm(0.5, old, newest=1) == pytest.approx(0.5 * norm(1.0, old), rel=1e-4)
    assert norm(0.5, old) == pytest.approx(norm(1.0, old), rel=1e-4)
    # With next to no weight, the old ones only take part in the mean.
    share = _drafts(new) / (_drafts(old) + _drafts(new))
    assert norm(1e-6, [*old, *new]) == pytest.approx(share * norm(1.0, new), rel=1e-3)


def test_tokens_whose_draft_was_rejected_weigh_as_told() -> None:
    plain, told = making.rollouts(POLICY, 3, seed=1), making.rollouts(POLICY, 3, seed=2)
    everywhere = [dataclasses.replace(r, rejected=torch.ones_like(r.captured)) for r in told]

    def step(weight: float, rollouts: list[Rollout]) -> StepReport:
        config = TrainingConfig(draft_tokens=3, rejected_weight=weight)
        return Trainer(making.drafter(POLICY), config).step(rollouts, LAYOUT, heads(0))

    alone = {name: step(1.0, rollouts) for name, rollouts in (("plain", plain), ("told", told))}
    assert alone["plain"].loss != pytest.approx(alone["told"].loss, rel=1e-3)
    for weight, like in ((1e-6, "plain"), (1e6, "told")):
        mixed = step(weight, [*plain, *everywhere])
        assert mixed.loss == pytest.approx(alone[like].loss, rel=1e-4)
        assert mixed.grad_norm == pytest.approx(alone[like].grad_norm, rel=1e-3)


def _drafts(rollouts: list[Rollout]) -> int:
    """Of three depths: all but a completion's first token, and one less at each depth."""
    return sum(max(r.completion_length - 1 - depth, 0) for r in rollouts for depth in range(3))


def test_a_step_does_not_depend_on_how_it_is_divided() -> None:
    config = TrainingConfig(draft_tokens=3, rejected_weight=7.0, depth_decay=0.6, gradient_clip=1e9)
    rollouts = [
        dataclasses.replace(rollout, rejected=torch.arange(rollout.length) % (index + 2) == 0)
        for index, rollout in enumerate(making.rollouts(POLICY, 5))
    ]
    whole, divided = (Trainer(making.drafter(POLICY), config) for _ in range(2))
    reports = (
        whole.step_on([rollouts], LAYOUT, heads(0)),
        divided.step_on([rollouts[:1], rollouts[1:3], rollouts[3:]], LAYOUT, heads(0)),
    )
    assert reports[0].loss == pytest.approx(reports[1].loss, rel=1e-5)
    for ours, theirs in zip(whole.drafter.parameters(), divided.drafter.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_non_finite_gradients_stop_the_training() -> None:
    broken = making.rollouts(POLICY, 2)
    assert broken[0].aux_hidden is not None
    broken[0].aux_hidden[4] = float("nan")
    with pytest.raises(RolloutError, match="not finite"):
        Trainer(making.drafter(POLICY), CONFIG).step(broken, LAYOUT, heads(0))


def test_rollouts_with_other_aux_layers_are_refused() -> None:
    layout = dataclasses.replace(LAYOUT, layer_ids=(1, 2, 4))
    with pytest.raises(RolloutError, match=r"\[1, 2, 4\]"):
        Trainer(making.drafter(POLICY), CONFIG).step(making.rollouts(POLICY, 2), layout, heads(0))


def test_state_of_another_drafter_is_refused(tmp_path: Path) -> None:
    Trainer(making.drafter(POLICY), CONFIG).save(tmp_path)
    other = making.policy_shape(vocab_size=29)
    with pytest.raises(CheckpointError, match="does not fit"):
        Trainer(making.drafter(other), CONFIG).restore(tmp_path)


def test_damaged_state_is_refused(tmp_path: Path) -> None:
    Trainer(making.drafter(POLICY), CONFIG).save(tmp_path)
    path = tmp_path / "trainer.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="trainer's state"):
        Trainer(making.drafter(POLICY), CONFIG).restore(tmp_path)


def test_a_step_in_bfloat16_goes_where_a_step_in_float32_goes() -> None:
    rollouts = making.rollouts(POLICY, 24)
    losses = {}
    for precision in ("float32", "bfloat16"):
        config = TrainingConfig(precision=precision, learning_rate=3e-3)
        trainer = Trainer(making.drafter(POLICY), config)
        losses[precision] = [trainer.step(rollouts, LAYOUT, heads(0)).loss for _ in range(15)]
        assert {p.dtype for p in trainer.drafter.parameters()} == {torch.float32}
    exact, rounded = torch.tensor(losses["float32"]), torch.tensor(losses["bfloat16"])
    assert exact[-1] < 0.9 * exact[0], "a step must matter for this comparison to mean anything"
    torch.testing.assert_close(rounded, exact, rtol=0.02, atol=0.02)


def test_feature_noise_changes_a_step_and_is_the_same_again_after_a_resume(tmp_path: Path) -> None:
    noisy = CONFIG.model_copy(update={"feature_noise": 0.5})
    quiet = Trainer(making.drafter(POLICY), CONFIG)
    trainer = Trainer(making.drafter(POLICY), noisy)
    assert take_steps(trainer, 1, first_seed=0) != take_steps(quiet, 1, first_seed=0)
    trainer.save(tmp_path)
    resumed = Trainer(making.drafter(POLICY, seed=1), noisy)
    resumed.restore(tmp_path)
    assert take_steps(resumed, 3, first_seed=7) == take_steps(trainer, 3, first_seed=7)
