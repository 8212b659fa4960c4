"""Broken checkpoints, manifests, spool files and requests: is every one refused, and nothing hurt?

A real engine in this process serves drafter version 2 with its control routes open. Cases of every
family are generated from a seed; a damaged version is put into the registry and asked for over
HTTP, a damaged spool file is read, a malformed request is sent.

refused
    answered with a message that says what is wrong (HTTP 4xx, or a RolloutError).
crashed
    any other exception or HTTP status, no answer, or an engine that afterwards does not serve the
    same drafter with the same greedy outputs and the same acceptance.
accepted_by_mistake
    loaded, or read as if it were sound.
"""

from __future__ import annotations

import random
import resource
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import httpx

from benchmarks.broken import content, folders, forged, requests
from benchmarks.live_engine import Bench, bench, parser, print_result, say
from drafttrain.errors import RolloutError
from drafttrain.integrations.vllm.local import serve_engine
from drafttrain.rollouts.spool import SpoolReader
from tests.vllm.engines import generate, greedy, make_engine, prompts, status

SERVING = 2
TOKEN = "the-bench-s-own"
# The engine is asked to prove itself after so many cases, and at the end.
PROVE_EVERY = 50


@dataclass(frozen=True)
class Outcome:
    verdict: str
    """"refused", "crashed" or "accepted_by_mistake"."""
    said: str


class Target:
    """The engine under fire, and what it did before."""

    def __init__(self, of: Bench, url: str, llm: Any) -> None:
        self.of, self.url, self.llm = of, url, llm
        self.version = max(of.registry.versions()) + 1
        self.home = of.registry.root / of.registry.name
        self.client = httpx.Client(headers={"Authorization": f"Bearer {TOKEN}"}, timeout=30)
        (self.segment,) = SpoolReader(of.folder / "spool").segment_paths()
        self.head = of.folder / "spool" / "heads" / "00000000.safetensors"
        self.expected = self._behaviour()
        self._accepts_what_is_sound()

    def checkpoint(self, damage: folders.FolderDamage, rng: random.Random) -> Outcome:
        """A copy of the serving version with something wrong in it."""
        folder = self.home / f"v{self.version:06d}"
        shutil.copytree(self.of.registry.folder(SERVING), folder)
        folders.reseal(folder, version=self.version)
        damage(folder, rng)
        try:
            return self.post(json={"version": self.version})
        finally:
            folders.remove(folder)

    def request(self, damage: requests.RequestDamage, rng: random.Random) -> Outcome:
        return self.post(**damage(rng))

    def post(self, path: str = "/drafttrain/drafter", **request: Any) -> Outcome:
        try:
            response = self.client.post(self.url + path, **request)
        except httpx.HTTPError as error:
            return Outcome("crashed", f"{type(error).__name__}: {error}")
        if response.status_code == 200:
            return Outcome("accepted_by_mistake", response.text)
        try:
            said = str(response.json()["error"])
        except (ValueError, KeyError, TypeError):
            return Outcome("crashed", f"status {response.status_code}: {response.text:.200}")
        clear = 400 <= response.status_code < 500 and said and "\n" not in said
        return Outcome("refused" if clear else "crashed", f"{response.status_code}: {said}")

    def segment_file(self, damage: content.BytesDamage, rng: random.Random) -> Outcome:
        return self._spool_file(self.segment, damage, rng)

    def head_file(self, damage: content.BytesDamage, rng: random.Random) -> Outcome:
        return self._spool_file(self.head, damage, rng)

    def _spool_file(self, path: Path, damage: content.BytesDamage, rng: random.Random) -> Outcome:
        whole, reader = path.read_bytes(), SpoolReader(self.of.folder / "spool")
        try:
            path.write_bytes(damage(whole, rng))
            if path == self.head:
                reader.read_head(0)
            else:
                list(reader.read(path).rollouts)
            return Outcome("accepted_by_mistake", str(path))
        except RolloutError as error:
            return Outcome("refused", str(error))
        except Exception as error:  # noqa: BLE001  what this benchmark looks for
            return Outcome("crashed", f"{type(error).__name__}: {error}")
        finally:
            path.unlink()  # a new file: readers may have the old one mapped
            path.write_bytes(whole)

    def _accepts_what_is_sound(self) -> None:
        """Or its refusals would mean nothing: an undamaged copy is served, and gone back from."""
        served = self.checkpoint(lambda folder, rng: None, random.Random())
        back = self.post(json={"version": SERVING})
        read = self._spool_file(self.segment, lambda whole, rng: whole, random.Random())
        for outcome in (served, back, read):
            assert outcome.verdict == "accepted_by_mistake", outcome

    def unharmed(self) -> bool:
        """The same drafter serves, with the same outputs and the same acceptance."""
        return self._behaviour() == self.expected

    def _behaviour(self) -> tuple[Any, ...]:
        before = status(self.llm)
        outputs = generate(self.llm, prompts([9, 20, 33], salt=70), greedy(40))
        after = status(self.llm)
        counts = [
            now - then
            for now, then in zip(
                (after.acceptance.rounds, after.acceptance.drafted, after.acceptance.accepted),
                (before.acceptance.rounds, before.acceptance.drafted, before.acceptance.accepted),
                strict=True,
            )
        ]
        return after.drafter_version, after.drafter_sha, outputs, counts


Case = Callable[[random.Random], Outcome]


def families(target: Target) -> dict[str, list[Case]]:
    """Every way to break something, by what is broken."""

    def bound(attack: Callable[[Any, random.Random], Outcome], damages: list[Any]) -> list[Case]:
        return [partial(attack, damage) for damage in damages]

    return {
        "torn files": bound(target.checkpoint, folders.TORN),
        "forged weights": bound(target.checkpoint, forged.FORGED_WEIGHTS),
        "forged config": bound(target.checkpoint, forged.FORGED_CONFIG),
        "forged manifest": bound(target.checkpoint, forged.FORGED_MANIFEST),
        "paths": bound(target.checkpoint, folders.PATHS),
        "requests": bound(target.request, requests.REQUESTS),
        "segments": bound(target.segment_file, content.BYTES),
        "heads": bound(target.head_file, content.BYTES),
    }


def attack(target: Target, cases: int, seed: int) -> dict[str, Any]:
    rng, ways = random.Random(seed), families(target)
    verdicts, by_family, failures = Counter[str](), Counter[str](), 0
    for index in range(cases):
        family = list(ways)[index % len(ways)]
        # In turn, so that each is used; those with chance in them differ every time.
        case = ways[family][index // len(ways) % len(ways[family])]
        outcome = case(rng)
        verdicts[outcome.verdict] += 1
        by_family[family] += outcome.verdict == "refused"
        if outcome.verdict != "refused":
            say(f"{outcome.verdict}: case {index}, {family}: {outcome.said:.300}")
        if (index + 1) % PROVE_EVERY == 0 or index == cases - 1:
            failures += not target.unharmed()
            say(f"{index + 1} cases, {verdicts['refused']} refused")
    return {
        "cases": cases,
        "refused": verdicts["refused"],
        "crashed": verdicts["crashed"] + failures,
        "accepted_by_mistake": verdicts["accepted_by_mistake"],
        "refused_by_family": dict(by_family),
        "seed": seed,
    }


def run(cases: int, seed: int) -> dict[str, Any]:
    with bench(versions=4) as of:
        token_file = of.folder / "token"
        token_file.write_text(TOKEN)
        llm = make_engine(
            of.policy, None, of.settings(token_file=str(token_file)),
            speculative_config=of.speculative(SERVING), enable_prefix_caching=False,
        )  # fmt: skip
        generate(llm, prompts([8, 9]), greedy(12))
        llm.collective_rpc("drafttrain_flush")
        llm.collective_rpc("drafttrain_capture", args=(False,))
        with serve_engine(llm) as server:
            target = Target(of, server.url, llm)
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = attack(target, cases, seed)
            grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
            return result | {"memory_grown_mib": round(grown / 1024)}


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--cases", type=int, default=500)
    arguments.add_argument("--seed", type=int, default=0)
    options = arguments.parse_args()
    print_result(run(options.cases, options.seed), options.json)


if __name__ == "__main__":
    main()
