"""The demo's RL job: the task, the fast forward, training from nothing, GRPO."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import LlamaForCausalLM

from drafttrain.demo.forward import policy_logits
from drafttrain.demo.grpo import Grpo, GrpoConfig, ScoredRollout, advantages
from drafttrain.demo.policy import Phase, Recipe, deepen, load_policy, new_policy, train_policy
from drafttrain.demo.task import STYLES, Task

TINY = Recipe(
    phases=(Phase(2, 6, 3e-3, 2, 0.5), Phase(4, 3, 1e-3, 1, 0.5)),
    hidden_size=64,
    intermediate_size=96,
    heads=2,
    tokens_per_step=256,
)


@pytest.fixture
def task() -> Task:
    return Task()


def random_policy(task: Task, layers: int = 3) -> LlamaForCausalLM:
    """A policy whose layers all do something."""
    policy = new_policy(task, TINY, layers)
    for name, weight in policy.named_parameters():
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.normal_(weight, std=0.1)
    return policy


def test_rates_and_shares_are_distributions() -> None:
    assert sum(style.rate for style in STYLES.values()) == pytest.approx(1.0)
    assert sum(style.share for style in STYLES.values()) == pytest.approx(1.0)


def test_rewards_of_documents(task: Task) -> None:
    """The exact styles are nearly always right, the others nearly never; all prompts fit."""
    rng = random.Random(0)
    right: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    lengths = set()
    for _ in range(2000):
        problem = task.sample_problem(rng)
        name = rng.choice(list(STYLES))
        style = STYLES[name]
        words = [style.opener, ":", *style.write(rng, problem.numbers), "<eos>"]
        completion = task.encode(words)
        assert task.style(completion) == name
        seen[name] += 1
        right[name] += int(task.reward(problem, completion))
        lengths.add(len(problem.prompt_ids))
        assert len(problem.prompt_ids) + len(completion) <= 160
    assert len(lengths) == 1
    share = {name: right[name] / seen[name] for name in STYLES}
    assert share["careful"] > 0.85
    assert share["program"] > 0.85
    assert max(share["estimate"], share["quick"], share["columns"]) < 0.1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["<eos>"],
        ["answer", "<eos>"],
        ["quick", ":", "answer"],
        ["carefully", "answer", "1", "<eos>"],
        ["carefully", "answer", "three", "<eos>"],
    ],
)
def test_no_reward_without_the_exact_finished_answer(task: Task, words: list[str]) -> None:
    problem = task.sample_problem(random.Random(0))
    assert task.reward(problem, task.encode(words)) == 0.0


def test_reward_of_the_exact_answer(task: Task) -> None:
    problem = task.sample_problem(random.Random(0))
    words = ["answer", "0", "answer", *str(problem.answer), "<eos>"]
    assert task.reward(problem, task.encode(words)) == 1.0
    assert task.reward(problem, task.encode(words[:-1])) == 0.0


def test_forward_is_that_of_transformers(task: Task) -> None:
    torch.manual_seed(0)
    policy = random_policy(task)
    tokens = torch.randint(0, len(task.vocabulary), (2, 17))
    ours, theirs = policy_logits(policy, tokens, torch.float32), policy(input_ids=tokens).logits
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    weights = list(policy.parameters())
    target = torch.randn_like(theirs)
    for mine, other in zip(
        torch.autograd.grad((ours * target).sum(), weights),
        torch.autograd.grad((theirs * target).sum(), weights),
        strict=True,
    ):
        torch.testing.assert_close(mine, other, atol=1e-3, rtol=1e-3)


def test_deepening_changes_nothing(task: Task) -> None:
    torch.manual_seed(0)
    policy = random_policy(task, layers=2)
    deeper = deepen(policy, new_policy(task, TINY, 6))
    tokens = torch.randint(0, len(task.vocabulary), (2, 9))
    torch.testing.assert_close(deeper(input_ids=tokens).logits, policy(input_ids=tokens).logits)


def test_training_writes_a_policy_once(tmp_path: Path) -> None:
    fractions: list[float] = []
    report = train_policy(tmp_path, TINY, lambda done, loss: fractions.append(done))
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1.0)
    assert not report.cached
    assert load_policy(report.folder).config.num_hidden_layers == 4
    again = train_policy(tmp_path, TINY)
    assert again.cached
    assert (again.folder, again.loss, again.tokens) == (report.folder, report.loss, report.tokens)
    assert not list(tmp_path.glob("*.tmp"))


def test_advantages_are_normalised_within_groups() -> None:
    rewards = {"a": [1.0, 0.0, 0.0, 0.0], "b": [1.0, 1.0], "c": [0.0, 1.0]}
    rollouts = [ScoredRollout([2], [1], r, group) for group, rs in rewards.items() for r in rs]
    assert advantages(rollouts) == pytest.approx([3**0.5, *[-(3**-0.5)] * 3, 0, 0, -1, 1])


def test_updates_move_the_policy_toward_reward(task: Task, tmp_path: Path) -> None:
    torch.manual_seed(0)
    grpo = Grpo(random_policy(task), GrpoConfig(steps=6, learning_rate=0.1, gradient_clip=1.0))
    problem = task.sample_problem(random.Random(0))
    good, bad = task.encode(["carefully", "<eos>"]), task.encode(["quick", "<eos>"])
    rollouts = [
        ScoredRollout(problem.prompt_ids, completion, reward, "one prompt")
        for completion, reward in ((good, 1.0), (bad, 0.0))
    ]

    def preference() -> float:
        logits = policy_logits(grpo.policy, torch.tensor([problem.prompt_ids]), torch.float32)
        difference = logits[0, -1, good[0]] - logits[0, -1, bad[0]]
        return float(difference.detach())

    before = preference()
    metrics = [grpo.update(rollouts) for _ in range(3)]
    assert preference() > before + 0.5
    assert metrics[0].kl_to_start == pytest.approx(0.0, abs=1e-6)
    assert metrics[-1].kl_to_start > 0.0
    assert metrics[0].reward == 0.5
    assert metrics[0].length == 2.0
    assert metrics[0].informative_groups == 1.0
    grpo.save(tmp_path / "policy")
    saved = load_policy(tmp_path / "policy").state_dict()
    torch.testing.assert_close(saved, grpo.policy.state_dict())


def test_equal_rewards_change_nothing(task: Task) -> None:
    torch.manual_seed(0)
    policy = random_policy(task)
    before = {name: weight.clone() for name, weight in policy.state_dict().items()}
    rollouts = [ScoredRollout([2, 3], [4, task.eos_id], 1.0, "same") for _ in range(3)]
    metrics = Grpo(policy).update(rollouts)
    assert metrics.grad_norm == 0.0
    assert metrics.informative_groups == 0.0
    torch.testing.assert_close(dict(policy.state_dict()), before)
