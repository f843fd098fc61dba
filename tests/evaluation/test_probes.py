"""Probes: their questions have the answers they claim, and an answer counts if greedy decoding gives it."""

import json
import random

import pytest
import torch

from secateur import evaluate, make_plan, prune
from secateur.evaluation.catalogue import TASK_SETS, task_names
from secateur.evaluation.probes import PROBES, QUESTIONS, questions
from secateur.evaluation.stability import Answer, Outcome, flips, stability


def last(asked):
    """The question itself, without the examples."""
    return asked.context.rpartition("\n\n")[2], asked.answer.strip()


def solve(name, question):
    """Answer by reading the question, without the code that made it."""
    if name == "probe-arithmetic":
        left, _, right, _ = question.split()
        return str(int(left) + int(right))
    if name == "probe-brackets":
        closing = {"(": ")", "[": "]", "{": "}"}
        return " ".join(closing[one] for one in reversed(question.splitlines()[0].split()[1:]))
    if name == "probe-copy":
        return question.splitlines()[0].removeprefix("line: ")
    if name == "probe-sort":
        return " ".join(sorted(question.splitlines()[0].split()[1:], key=int))
    if name == "probe-recall":
        *facts, asked, _ = question.splitlines()
        key = asked.removeprefix("Question: the number of the ").removesuffix("?")
        (value,) = [
            one.rpartition(" ")[2].rstrip(".") for one in facts if one.startswith(f"The number of the {key} is ")
        ]
        return value
    instruction, _, words = question.splitlines()[0].partition(" Words: ")
    one, two = words.split()
    return {
        "Write the words in capital letters.": f"{one} {two}".upper(),
        "Put quotation marks around each word.": f'"{one}" "{two}"',
        "Separate the words by a comma.": f"{one}, {two}",
        "Write the words in reverse order.": f"{two} {one}",
        "Write the first word twice.": f"{one} {one}",
        "Write the words as a JSON list.": json.dumps([one, two]),
    }[instruction]


@pytest.mark.parametrize("name", PROBES)
def test_every_answer_is_right_and_questions_are_always_the_same(name):
    made = questions(PROBES[name])
    assert len(made) == QUESTIONS
    assert made == questions(PROBES[name])
    assert len({one.context for one in made}) == QUESTIONS
    for one in made:
        question, answer = last(one)
        assert answer == solve(name, question)
        assert one.answer.startswith(" ")
        assert one.answer.endswith("\n")
        assert one.context.count("\n\n") == PROBES[name].shots


@pytest.mark.parametrize("name", ["probe-arithmetic", "probe-brackets", "probe-sort", "probe-recall"])
def test_the_floor_is_what_a_guess_of_the_right_form_reaches(name):
    """Guesses are drawn as a model would that knows the form and nothing else."""
    rng, probe, hits, tries = random.Random(0), PROBES[name], 0.0, 300
    for level in probe.levels:
        for _ in range(tries):
            question, answer = probe.ask(rng, level)
            if name == "probe-arithmetic":
                guess = f" {rng.randrange(2 * 10**level - 1)}"
            elif name == "probe-brackets":
                guess = " " + " ".join(rng.choices(")]}", k=level))
            elif name == "probe-sort":
                numbers = question.splitlines()[0].split()[1:]
                guess = " " + " ".join(rng.sample(numbers, level))
            else:
                guess = " " + rng.choice(question.splitlines()[:-2]).rpartition(" ")[2].rstrip(".")
            hits += guess == answer
    assert hits / (tries * len(probe.levels)) == pytest.approx(probe.chance, abs=0.04)


def test_sets_of_tasks():
    assert task_names("probes") == list(PROBES)
    assert task_names("reasoning,probe-sort") == ["gsm8k", *PROBES]
    assert TASK_SETS["probes"] == tuple(PROBES)


@torch.no_grad()
def test_an_answer_counts_if_greedy_decoding_gives_it(bundled):
    """Against tokens drawn one by one, for a cut too, and with stability and flips."""
    cut = prune(bundled, make_plan(bundled, method="last-n", blocks=3))
    results = evaluate(cut, against=bundled, tasks="probe-copy", windows=1)
    found = {(one.role, one.measure): one for one in results}
    right = {}
    for role, model in (("model", cut), ("against", bundled)):
        right[role] = []
        for one in questions(PROBES["probe-copy"]):
            context = bundled.tokenizer(one.context, return_tensors="pt")["input_ids"]
            whole = bundled.tokenizer(one.context + one.answer, return_tensors="pt")["input_ids"]
            logits = model.module(input_ids=whole).logits[0, context.shape[1] - 1 : -1]
            right[role].append(bool((logits.argmax(-1) == whole[0, context.shape[1] :]).all()))
        assert found[role, "acc"].value == pytest.approx(sum(right[role]) / QUESTIONS)
        assert found[role, "acc"].settings["floor"] == round(PROBES["probe-copy"].chance, 4)
        assert (role, "acc_per_token") not in found


def test_stability_of_exact_answers():
    before, after = (
        [Answer((-1.0,), (3,), frozenset({0}), exact=one) for one in many] for many in ((1, 1, 0, 0), (1, 0, 0, 1))
    )
    assert stability(before, after) == 0.5
    assert flips(before, after) == 0.5
    outcome = Outcome("t", {"acc": 0.5}, {}, tuple(before), {}, "f")
    assert Outcome.of(json.loads(json.dumps(outcome.as_dict()))) == outcome
