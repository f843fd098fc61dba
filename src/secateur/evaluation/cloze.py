"""`stdlib-cloze`: choose the true continuation of a piece of code among four, on held-out standard library modules.

A question is some lines of a module and what follows them; the wrong options begin at line starts elsewhere in the
held-out modules. All four have the same number of tokens in the model's tokenizer. The task needs no network, and small
code models score well above chance (25 %), so that accuracy and stability are meaningful offline.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

from transformers import PreTrainedTokenizerBase

from secateur.data.interpreter import STDLIB
from secateur.data.sources import open_documents
from secateur.errors import InputError

NAME = "stdlib-cloze"
QUESTIONS = 256
CONTEXT_TOKENS = 64
OPTION_TOKENS = 16
OPTIONS = 4

_CHARACTERS = 20_000
"""Number of characters read of each module."""
_TRIES = 20
"""Positions tried per requested question."""
_LINE_END = re.compile(r"\S(?=\n[ ]*[^\s#])")
"""Matches the last character of a line that is directly followed by code."""


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        context: the lines before; ends with the last character of a line.
        options: possible continuations, each beginning with the end of that line.
        right: index of the true one.
    """

    context: str
    options: tuple[str, ...]
    right: int


def questions(
    tokenizer: PreTrainedTokenizerBase,
    count: int = QUESTIONS,
    *,
    context_tokens: int = CONTEXT_TOKENS,
    option_tokens: int = OPTION_TOKENS,
    seed: int = 0,
) -> list[Question]:
    """Return questions from the standard library of the running interpreter, always the same ones.

    Modules take turns, so that long ones do not dominate.

    Raises:
        InputError: the source of the standard library is missing, or yields too few questions.
    """
    modules = [text[:_CHARACTERS] for text in open_documents(STDLIB, "held-out", seed, whole=True).texts]
    rng = random.Random(seed)
    every = [_in_random_order(rng, number, text) for number, text in enumerate(modules)]
    places = [place for place in chain.from_iterable(zip_longest(*every)) if place is not None]
    cut = _Cutter(tokenizer, modules, context_tokens, option_tokens)
    found: list[Question] = []
    for place in places[: _TRIES * count]:
        question = cut.question(place, places, rng)
        if question is not None:
            found.append(question)
        if len(found) == count:
            return found
    raise InputError(f"{NAME}: only {len(found)} of {count} questions can be made from the standard library here.")


def digest(made: list[Question]) -> str:
    """Return a fingerprint of a set of questions."""
    text = "\x1e".join("\x1f".join((one.context, *one.options)) for one in made)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


Place = tuple[int, int]
"""Index of the module, and the position of a line end in it."""


def _in_random_order(rng: random.Random, number: int, text: str) -> list[Place]:
    places = [(number, match.end()) for match in _LINE_END.finditer(text)]
    rng.shuffle(places)
    return places


@dataclass(frozen=True)
class _Cutter:
    tokenizer: PreTrainedTokenizerBase
    modules: list[str]
    context_tokens: int
    option_tokens: int

    def question(self, place: Place, places: list[Place], rng: random.Random) -> Question | None:
        """Return the question at a position; None if the text is too short there, or does not split into tokens."""
        context = self._context(place)
        true = self._option(place)
        if context is None or true is None or not self._fits(context, true):
            return None
        options = [true]
        for other in self._elsewhere(place, places, rng):
            option = self._option(other)
            if option is not None and option not in options and self._fits(context, option):
                options.append(option)
            if len(options) == OPTIONS:
                rng.shuffle(options)
                return Question(context, tuple(options), options.index(true))
        return None

    def _elsewhere(self, place: Place, places: list[Place], rng: random.Random) -> Iterator[Place]:
        for _ in range(8 * OPTIONS):
            other = rng.choice(places)
            if other != place:
                yield other

    def _context(self, place: Place) -> str | None:
        number, end = place
        text = self.modules[number][:end][-12 * self.context_tokens :]
        ids = self._encode(text)
        context = self._decode(ids[-self.context_tokens :])
        return context if len(ids) >= self.context_tokens and text.endswith(context) else None

    def _option(self, place: Place) -> str | None:
        number, start = place
        text = self.modules[number][start : start + 12 * self.option_tokens]
        option = self._decode(self._encode(text)[: self.option_tokens])
        return option if text.startswith(option) else None

    def _fits(self, context: str, option: str) -> bool:
        """Return whether the option has its number of tokens also after this context."""
        return len(self._encode(context + option)) - len(self._encode(context)) == self.option_tokens

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def _decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
