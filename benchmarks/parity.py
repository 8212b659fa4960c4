"""Is what is trained what drafts? Every kind of drafter in a real engine, on a CPU in float32.

Two comparisons, for each subject:

- *drafts*: the tokens the engine drafts (k = 1 .. 5, and after a swap), against those our forward
  drafts on the same context, which is the rollout so far and what the round has drafted itself;
- *acceptance*: the replay estimate on the rollouts an engine made, against that engine's counters.

    python -m benchmarks.parity [--json] [--only NAME ...] [--drafted N]
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks.engines import Engine, prompts
from benchmarks.subjects import SUBJECTS, Subject, make_policy, subject_named
from drafttrain.checkpoints.registry import Registry
from drafttrain.config import TrainingConfig
from drafttrain.control.acceptance import DraftSampleMethod, estimate_acceptance, usable
from drafttrain.drafters import Drafter, PolicyShape, load_drafter
from drafttrain.drafters.batch import make_batch
from drafttrain.pretrain import pretrain
from drafttrain.publishing import publish_folder
from drafttrain.rollouts.record import Rollout
from drafttrain.rollouts.replay import Replay

K = 3
_T = TypeVar("_T")
_ROUNDS_AT_ONCE = 128


@dataclass(frozen=True)
class Drafted:
    """One round of an engine: after ``tokens[start]`` of a rollout it drafted `tokens`."""

    rollout_id: str
    start: int
    tokens: list[int]


@dataclass(frozen=True)
class DraftParity:
    """Attributes:
    positions: drafted tokens compared.
    agreeing: those our forward drafts as well.
    ties: of the rest, those whose logits differ by less than 1e-4 in our forward.
    swapped: whether the drafter came by a swap.
    """

    subject: str
    k: int
    positions: int
    agreeing: int
    ties: int
    swapped: bool = False


@dataclass(frozen=True)
class AcceptanceParity:
    """Attributes:
    drafted: tokens the engine drafted.
    counted, estimated: acceptance length by its counters, and by the replay estimate.
    """

    subject: str
    draft_sample_method: str
    temperature: float
    drafted: int
    counted: float
    estimated: float

    @property
    def ratio(self) -> float:
        return self.estimated / self.counted


class Bench:
    """A trained drafter of one subject, and engines that draft with it.

    Args:
        subject: see there.
        folder: to work in.
        steps: of training; an untrained drafter accepts too little to show anything.
    """

    def __init__(self, subject: Subject, folder: Path, steps: int = 80) -> None:
        self.subject, self.folder = subject, folder
        self.policy = folder / f"policy-{subject.family}"
        if not self.policy.exists():
            make_policy(self.policy, subject.family)
        self.shape = PolicyShape.from_folder(self.policy)
        self.drafter = self._trained(steps)

    def engine(self, k: int, method: DraftSampleMethod = "greedy") -> Engine:
        return self._engine(self._home / "trained", k, method)

    def swapped(self, k: int) -> Engine:
        """It drafts greedily; the trained drafter came in the place of an untrained one."""
        registry = Registry(Path(tempfile.mkdtemp(dir=self._home)) / "registry")
        for name in ("start", "trained"):
            publish_folder(self._home / name, self.policy, registry)
        engine = self._engine(registry.folder(1), k, "greedy", registry.root)
        (reply,) = engine.llm.collective_rpc("drafttrain_swap", args=(2,))
        assert reply.get("version") == 2, reply
        return engine

    def parity(self, k: int, count: int = 48, engine: Engine | None = None) -> DraftParity:
        """Greedy drafts in sampled rollouts; `engine` is one that drafts k tokens greedily."""
        engine = engine or self.engine(k)
        with recording(engine) as rounds:
            rollouts = engine.generate(prompts(count, salt=k), temperature=1.0, max_tokens=24)
        return compare(self, engine, rollouts, rounds, k)

    def acceptance(
        self, engine: Engine, method: DraftSampleMethod, temperature: float, drafted: int
    ) -> AcceptanceParity:
        """Over at least `drafted` tokens."""
        before, rollouts, salt = engine.acceptance(), [], int(100 * temperature)
        while engine.acceptance().drafted - before.drafted < drafted:
            rollouts += engine.generate(prompts(256, salt=(salt := salt + 1)), temperature, 48)
        after = engine.acceptance()
        accepted = sum(after.accepted_per_position) - sum(before.accepted_per_position)
        replay = Replay(engine.spool)
        replay.refresh()
        whole = [rollout for rollout in rollouts if usable(rollout, K)]
        estimate = estimate_acceptance(
            self.drafter, whole, replay.layout, replay.heads_of(whole), k=K, method=method
        )
        return AcceptanceParity(
            self.subject.name,
            method,
            temperature,
            after.drafted - before.drafted,
            1 + accepted / (after.rounds - before.rounds),
            estimate.acceptance_length,
        )

    @property
    def _home(self) -> Path:
        # Not by its name: for vLLM, "eagle3" in the path of another kind decides the method.
        return self.folder / f"subject-{SUBJECTS.index(self.subject)}"

    def _engine(
        self, drafter: Path, k: int, method: DraftSampleMethod, registry: Path | None = None
    ) -> Engine:
        spool = Path(tempfile.mkdtemp(dir=self._home, prefix="spool-"))
        return Engine(
            self.policy,
            drafter,
            method=self.subject.kind,
            k=k,
            spool=spool,
            draft_sample_method=method,
            overrides=self.subject.overrides,
            registry=registry,
        )

    def _trained(self, steps: int) -> Drafter:
        start, trained = self._home / "start", self._home / "trained"
        self.subject.drafter(self.policy).export(start, torch.float32)
        engine = self._engine(start, K, "probabilistic")
        engine.generate(prompts(160), temperature=1.0, max_tokens=40)
        drafter = load_drafter(start, self.shape)
        config = TrainingConfig(draft_tokens=K, learning_rate=5e-3, tokens_per_step=512)
        pretrain(drafter, Replay(engine.spool), config, steps=steps)
        drafter.export(trained, torch.float32)
        return load_drafter(trained, self.shape)


class recording:
    """Lists the rounds an engine verifies, as its scheduler hands them to the model runner."""

    def __init__(self, engine: Engine) -> None:
        self._runner = engine.runner

    def __enter__(self) -> list[Drafted]:
        self._execute = self._runner.execute_model
        rounds: list[Drafted] = []

        def execute(scheduled: Any, *more: Any, **options: Any) -> Any:
            requests = scheduled.scheduled_cached_reqs
            starts = dict(zip(requests.req_ids, requests.num_computed_tokens, strict=True))
            for req_id, tokens in scheduled.scheduled_spec_decode_tokens.items():
                rounds.append(Drafted(f"bench:{req_id}", starts[req_id], list(tokens)))
            return self._execute(scheduled, *more, **options)

        self._runner.execute_model = execute
        return rounds

    def __exit__(self, *_: object) -> None:
        self._runner.execute_model = self._execute


@torch.no_grad()
def compare(
    bench: Bench, engine: Engine, rollouts: list[Rollout], rounds: list[Drafted], k: int
) -> DraftParity:
    """What the engine drafted, and what our forward drafts in its place."""
    replay = Replay(engine.spool)
    replay.refresh()
    head = replay.head(rollouts[0].policy_version)
    by_id = {rollout.rollout_id: rollout for rollout in rollouts}
    positions = agreeing = ties = 0
    for part in _batches([r for r in rounds if len(r.tokens) == k and r.rollout_id in by_id]):
        contexts = [_context(by_id[drafted.rollout_id], drafted) for drafted in part]
        batch = make_batch(contexts, replay.layout, head)
        hidden = bench.drafter.unroll(batch, head.embed_tokens, k)
        logits = hidden @ bench.drafter.head_weight(head.lm_head).T
        theirs = torch.tensor([drafted.tokens for drafted in part]).T.contiguous()
        if bench.drafter.draft_ids is not None:  # to rows of the head
            theirs = torch.searchsorted(bench.drafter.draft_ids, theirs)
        same = logits.argmax(-1) == theirs
        gap = logits.amax(-1) - logits.gather(-1, theirs[..., None])[..., 0]
        positions += same.numel()
        agreeing += int(same.sum())
        ties += int((~same & (gap < 1e-4)).sum())
    return DraftParity(bench.subject.name, k, positions, agreeing, ties)


def _batches(rounds: list[Drafted]) -> Iterator[list[Drafted]]:
    for start in range(0, len(rounds), _ROUNDS_AT_ONCE):
        yield rounds[start : start + _ROUNDS_AT_ONCE]


def _context(rollout: Rollout, drafted: Drafted) -> Rollout:
    """The rollout as it was when the round started, and its drafts: it holds that one round."""
    start, more = drafted.start, len(drafted.tokens)
    rows = torch.arange(start + 1 + more).clamp_max(rollout.length - 1)
    tokens = rollout.tokens[rows].clone()
    tokens[start + 1 :] = torch.tensor(drafted.tokens)
    aux = rollout.aux_hidden
    return replace(
        rollout,
        tokens=tokens,
        prompt_length=start,
        captured=rollout.captured[rows] & (torch.arange(len(rows)) < start),
        last_hidden=rollout.last_hidden[rows],
        aux_hidden=None if aux is None else aux[rows],
    )


def run(bench: Bench, drafted: int) -> Iterator[DraftParity | AcceptanceParity]:
    """Everything of one subject, one result after the other."""
    for k in range(1, 6):
        yield bench.parity(k)
    yield replace(bench.parity(K, engine=bench.swapped(K)), swapped=True)
    methods: tuple[DraftSampleMethod, ...] = ("greedy", "probabilistic")
    for method in methods:
        engine = bench.engine(K, method)
        for temperature in (0.7, 1.0):
            yield bench.acceptance(engine, method, temperature, drafted)


def in_own_process(function: Callable[..., _T], *arguments: object) -> _T:
    """vLLM makes a process's groups for its first engine; experts need one that others do not."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def results_of(name: str, drafted: int) -> list[DraftParity | AcceptanceParity]:
    """Those of the subject of that name."""
    with tempfile.TemporaryDirectory() as folder:
        return list(run(Bench(subject_named(name), Path(folder)), drafted))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--only", nargs="+", choices=[s.name for s in SUBJECTS])
    parser.add_argument("--drafted", type=int, default=20_000, help="draft tokens a measurement")
    options = parser.parse_args()
    drafts: list[dict[str, Any]] = []
    acceptance: list[dict[str, Any]] = []
    for name in options.only or [subject.name for subject in SUBJECTS]:
        print(f"{name} …", file=sys.stderr, flush=True)
        for result in in_own_process(results_of, name, options.drafted):
            if isinstance(result, DraftParity):
                drafts.append(asdict(result))
            else:
                acceptance.append(asdict(result) | {"ratio": result.ratio})
            if not options.json:
                print(result, flush=True)
    if options.json:
        print(json.dumps({"drafts": drafts, "acceptance": acceptance}))


if __name__ == "__main__":
    main()
