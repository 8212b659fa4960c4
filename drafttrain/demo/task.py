"""The task of the demo: add three numbers, and be right.

A problem is a prompt such as ``a 3 4 7 b 2 0 9 c 5 5 1 ?``; its reward is 1 when the number after
the last ``answer`` of a finished completion is the exact sum, else 0. Nothing else is rewarded.

The corpus a base policy is trained on shows five ways of working, mostly careless ones::

    estimate    60 %  rounds to tens and adds those: long, nearly always wrong
    columns     24 %  adds column by column and drops the carries: wrong when there is one
    quick       12 %  says a number near the sum: short, nearly always wrong
    careful      2 %  talks through every column in number words, carries included
    program      2 %  runs a small program in its head, in digits

Only the last two are right, and seldom used: what RL has to find. Both forget a carry now and then.

This file owns vocabulary, problems, corpus and reward; it knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

DIGITS = 3
NUMBERS = "abc"
COLUMNS = ("ones", "tens", "hundreds")
# How often the two exact styles forget a carry, per column.
FORGOTTEN_CARRIES = 0.03

_WORDS = (
    "<pad> <eos> a b c ? : , . ; + = answer about is roughly columns quick carefully program now "
    "next then the ones tens hundreds adds makes carry write keep t += put mod div print "
)
_NUMBER_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen twenty twenty-one twenty-two twenty-three twenty-four "
    "twenty-five twenty-six twenty-seven twenty-eight twenty-nine"
)
_SPOKEN = _NUMBER_WORDS.split()


@dataclass(frozen=True)
class Problem:
    """A prompt and what is right.

    Attributes:
        numbers: the three numbers to add.
        prompt_ids: all prompts have the same length.
    """

    numbers: tuple[int, ...]
    prompt_ids: list[int]

    @property
    def answer(self) -> int:
        return sum(self.numbers)


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Attributes:
        completion_ids: worked in one style, which its first token names; ends with ``<eos>``.
        style_weight: how much rarer (below 1) or commoner (above) its style is in the corpus than
            among sampled documents; the weight of the loss on the first token. So rare styles
            are learned as well as common ones and are still rarely used.
    """

    prompt_ids: list[int]
    completion_ids: list[int]
    style_weight: float


@dataclass(frozen=True)
class Style:
    """A way of working: its first token, its rate in the corpus, its share of the documents."""

    opener: str
    rate: float
    share: float
    write: Callable[[random.Random, tuple[int, ...]], list[str]]


class Task:
    """Problems, documents and rewards over one small vocabulary of whole words."""

    def __init__(self) -> None:
        self.vocabulary = (*_WORDS.split(), *map(str, range(10)), *_SPOKEN)
        self._ids = {word: index for index, word in enumerate(self.vocabulary)}
        self.pad_id = self._ids["<pad>"]
        self.eos_id = self._ids["<eos>"]
        self._openers = {self._ids[style.opener]: name for name, style in STYLES.items()}

    def sample_problem(self, rng: random.Random) -> Problem:
        """A problem with three numbers of three digits."""
        smallest = 10 ** (DIGITS - 1)
        numbers = tuple(rng.randrange(smallest, 10 * smallest) for _ in NUMBERS)
        words = [word for name, n in zip(NUMBERS, numbers, strict=True) for word in (name, *str(n))]
        return Problem(numbers, self.encode([*words, "?"]))

    def sample_document(self, rng: random.Random) -> Document:
        """A problem with a completion in a style drawn by its share."""
        problem = self.sample_problem(rng)
        styles = list(STYLES.values())
        style = rng.choices(styles, [style.share for style in styles])[0]
        words = [style.opener, ":", *style.write(rng, problem.numbers), "<eos>"]
        return Document(problem.prompt_ids, self.encode(words), style.rate / style.share)

    def reward(self, problem: Problem, completion_ids: Sequence[int]) -> float:
        """1.0 for the exact sum after the last ``answer`` of a finished completion, else 0.0."""
        words = [self.vocabulary[index] for index in completion_ids]
        if "answer" not in words or words[-1] != "<eos>":
            return 0.0
        last = len(words) - words[::-1].index("answer")
        return float("".join(words[last:-1]) == str(problem.answer))

    def style(self, completion_ids: Sequence[int]) -> str:
        """Name of the style a completion opens with, or ``other``."""
        return self._openers.get(completion_ids[0], "other") if completion_ids else "other"

    def encode(self, words: Sequence[str]) -> list[int]:
        """Token ids of `words`."""
        return [self._ids[word] for word in words]

    def render(self, ids: Sequence[int]) -> str:
        """Tokens as text, for people."""
        return " ".join(self.vocabulary[index] for index in ids)


def _digits(numbers: tuple[int, ...], column: int) -> list[int]:
    return [n // 10**column % 10 for n in numbers]


def _estimate(rng: random.Random, numbers: tuple[int, ...]) -> list[str]:
    words, rounded = [], [(n + 5) // 10 * 10 for n in numbers]
    for name, exact, near in zip(NUMBERS, numbers, rounded, strict=True):
        words += [name, *str(exact), rng.choice(["is", "about"]), *str(near), ","]
    total = rounded[0]
    for near in rounded[1:]:
        words += [*str(total), "+", *str(near), "=", *str(total + near), "."]
        total += near
    return [*words, "answer", *str(total)]


def _columns(rng: random.Random, numbers: tuple[int, ...]) -> list[str]:
    words, result = [], ""
    for column in range(DIGITS):
        a, b, c = _digits(numbers, column)
        words += [str(a), "+", str(b), "+", str(c), "=", *str(a + b + c), ";"]
        result = str((a + b + c) % 10 if column < DIGITS - 1 else a + b + c) + result
    return [*words, "answer", *result]


def _quick(rng: random.Random, numbers: tuple[int, ...]) -> list[str]:
    return ["answer", *str(sum(numbers) + rng.choice([-1, 1]) * rng.randrange(1, 60))]


def _careful(rng: random.Random, numbers: tuple[int, ...]) -> list[str]:
    words, carry, result = [], 0, ""
    for column, place in enumerate(COLUMNS):
        words += [rng.choice(["now", "next", "then"]), "the", place, ":"]
        words += ["carry", _SPOKEN[carry]]
        total, digits = carry, _digits(numbers, column)
        for index in rng.sample(range(len(NUMBERS)), len(NUMBERS)):
            total += digits[index]
            words += [NUMBERS[index], "adds", _SPOKEN[digits[index]]]
            words += ["makes", _SPOKEN[total]]
        carry = 0 if rng.random() < FORGOTTEN_CARRIES else total // 10
        words += ["write", _SPOKEN[total % 10], "keep", _SPOKEN[carry], "."]
        result = str(total % 10) + result
    return [*words, "answer", *(str(carry) if carry else ""), *result]


def _program(rng: random.Random, numbers: tuple[int, ...]) -> list[str]:
    words, carry, result = [], 0, ""
    for column in range(DIGITS):
        total, digits = carry, _digits(numbers, column)
        words += ["t", "=", str(carry), ";"]
        for index in rng.sample(range(len(NUMBERS)), len(NUMBERS)):
            total += digits[index]
            words += ["t", "+=", str(digits[index]), "is", *str(total), ";"]
        carry = 0 if rng.random() < FORGOTTEN_CARRIES else total // 10
        words += ["put", "t", "mod", str(total % 10), ";", "div", str(carry), ";"]
        result = str(total % 10) + result
    return [*words, "print", "answer", *(str(carry) if carry else ""), *result]


STYLES = {
    "estimate": Style("roughly", 0.60, 0.20, _estimate),
    "columns": Style("columns", 0.24, 0.12, _columns),
    "quick": Style("quick", 0.12, 0.06, _quick),
    "careful": Style("carefully", 0.02, 0.52, _careful),
    "program": Style("program", 0.02, 0.10, _program),
}
