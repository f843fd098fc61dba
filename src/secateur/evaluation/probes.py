"""Probes: what a model can do, exactly or not at all, made on the spot from a seed. They need no data set.

Perplexity and multiple choice forgive what generation does not: a model that lost a tenth of its perplexity may have
lost its arithmetic altogether (Qwen3-8B without 8 of its blocks keeps 0.51 on MMLU and falls to 0.011 on GSM8K). A
probe shows examples and asks for one more answer; it counts if greedy decoding gives that answer and nothing else. Each
probe grows from trivial to hard, so that a dense model of any size is somewhere between its floor and 1.

`probe-arithmetic` sums of growing length; `probe-brackets` closing what was opened; `probe-copy` repeating a line;
`probe-sort` numbers in ascending order; `probe-recall` a value by its key, over a growing context; `probe-format`
simple instructions on the form of an answer.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

QUESTIONS = 48
"""Questions of each probe, the same number of every level."""
_SHOTS = 4
_WORDS = [
    "river",
    "stone",
    "apple",
    "house",
    "green",
    "paper",
    "light",
    "table",
    "music",
    "horse",
    "ocean",
    "bread",
    "cloud",
    "glass",
    "tiger",
    "lemon",
    "chair",
    "north",
    "plant",
    "silver",
    "window",
    "garden",
    "summer",
    "pencil",
    "bridge",
    "candle",
    "rabbit",
    "violet",
    "hammer",
    "basket",
]


@dataclass(frozen=True)
class Probe:
    """A kind of question.

    Attributes:
        name: as a task.
        levels: from easy to hard; a number that `ask` takes.
        ask: draws one question of a level: what is shown, and the answer.
        floor: accuracy of guessing an answer of the right form, at best.
        shots: examples before each question, of the same level.
    """

    name: str
    levels: tuple[int, ...]
    ask: Callable[[random.Random, int], tuple[str, str]]
    floor: Callable[[int], float]
    shots: int = _SHOTS

    @property
    def chance(self) -> float:
        """The floor, averaged over the levels."""
        return sum(map(self.floor, self.levels)) / len(self.levels)


@dataclass(frozen=True)
class Asked:
    """One question as text: the examples and the question, and the answer with the line end that closes it."""

    context: str
    answer: str


def questions(probe: Probe, count: int = QUESTIONS, *, seed: int = 0) -> list[Asked]:
    """Return the questions of a probe, always the same ones; levels take turns, so that a few are of every level."""
    rng = random.Random(f"{probe.name} {seed}")
    found = []
    for number in range(count):
        level = probe.levels[number % len(probe.levels)]
        pairs = [probe.ask(rng, level) for _ in range(probe.shots + 1)]
        shown = "".join(f"{asked}{answer}\n\n" for asked, answer in pairs[:-1])
        found.append(Asked(shown + pairs[-1][0], f"{pairs[-1][1]}\n"))
    return found


def _arithmetic(rng: random.Random, digits: int) -> tuple[str, str]:
    left, right = (rng.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits) for _ in range(2))
    return f"{left} + {right} =", f" {left + right}"


def _brackets(rng: random.Random, depth: int) -> tuple[str, str]:
    pairs = [rng.choice(("()", "[]", "{}")) for _ in range(depth)]
    opened, closed = (" ".join(one[side] for one in order) for side, order in ((0, pairs), (1, pairs[::-1])))
    return f"open: {opened}\nclose:", f" {closed}"


def _copy(rng: random.Random, length: int) -> tuple[str, str]:
    line = " ".join(rng.choices(_WORDS, k=length))
    return f"line: {line}\nagain:", f" {line}"


def _sort(rng: random.Random, length: int) -> tuple[str, str]:
    numbers = rng.sample(range(1, 100), length)
    return f"numbers: {' '.join(map(str, numbers))}\nsorted:", f" {' '.join(map(str, sorted(numbers)))}"


def _recall(rng: random.Random, pairs: int) -> tuple[str, str]:
    keys = rng.sample([f"{a} {b}" for a in _WORDS[:12] for b in _WORDS[12:]], pairs)
    values = [str(rng.randrange(1000, 10000)) for _ in keys]
    listed = "".join(f"The number of the {key} is {value}.\n" for key, value in zip(keys, values, strict=True))
    place = rng.randrange(pairs)
    return f"{listed}Question: the number of the {keys[place]}?\nAnswer:", f" {values[place]}"


_FORMATS: tuple[tuple[str, Callable[[str, str], str]], ...] = (
    ("Write the words in capital letters.", lambda a, b: f"{a} {b}".upper()),
    ("Put quotation marks around each word.", lambda a, b: f'"{a}" "{b}"'),
    ("Separate the words by a comma.", lambda a, b: f"{a}, {b}"),
    ("Write the words in reverse order.", lambda a, b: f"{b} {a}"),
    ("Write the first word twice.", lambda a, _: f"{a} {a}"),
    ("Write the words as a JSON list.", lambda a, b: f'["{a}", "{b}"]'),
)


def _format(rng: random.Random, kind: int) -> tuple[str, str]:
    instruction, form = _FORMATS[kind]
    first, second = rng.sample(_WORDS, 2)
    return f"{instruction} Words: {first} {second}\nAnswer:", f" {form(first, second)}"


PROBES: dict[str, Probe] = {
    one.name: one
    for one in (
        Probe("probe-arithmetic", (1, 2, 3, 4), _arithmetic, lambda digits: 1 / (2 * 10**digits - 1)),
        Probe("probe-brackets", (1, 2, 3, 5), _brackets, lambda depth: 3.0**-depth),
        Probe("probe-copy", (2, 4, 8, 16), _copy, lambda length: len(_WORDS) ** -float(length)),
        Probe("probe-sort", (2, 3, 4, 6), _sort, lambda length: 1 / math.factorial(length)),
        Probe("probe-recall", (2, 6, 16, 32), _recall, lambda pairs: 1 / pairs, shots=1),
        Probe("probe-format", tuple(range(len(_FORMATS))), _format, lambda _: 0.0),
    )
}
"""All probes by name."""
