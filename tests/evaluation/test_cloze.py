"""The bundled task: true continuations among four pieces of code of equal length."""

import pytest

from secateur.errors import InputError
from secateur.evaluation import cloze


@pytest.fixture(scope="module")
def made(bundled):
    return cloze.questions(bundled.tokenizer, 24)


def test_four_options_of_equal_length_in_context(made, bundled):
    def tokens(text):
        return bundled.tokenizer(text, add_special_tokens=False)["input_ids"]

    for one in made:
        before = tokens(one.context)
        assert len(before) == cloze.CONTEXT_TOKENS
        assert not one.context[-1].isspace(), "the harness would move trailing spaces into the options"
        assert len(set(one.options)) == cloze.OPTIONS
        for option in one.options:
            both = tokens(one.context + option)
            assert both[: len(before)] == before
            assert len(both) - len(before) == cloze.OPTION_TOKENS


def test_the_right_option_is_what_follows(made):
    files = [text.read_text("utf-8", "ignore") for name, text in _held_out()]
    for one in made:
        follows = [any(one.context + option in text for text in files) for option in one.options]
        assert follows[one.right]
        assert sum(follows) == 1


def test_the_same_every_time_and_spread_over_places(made, bundled):
    again = cloze.questions(bundled.tokenizer, 24)
    assert again == made
    assert cloze.digest(again) == cloze.digest(made) != cloze.digest(made[1:])
    assert len({one.right for one in made}) == cloze.OPTIONS
    assert cloze.questions(bundled.tokenizer, 24, seed=1) != made


def test_too_few_places(bundled):
    with pytest.raises(InputError, match="only 0 of 1 questions"):
        cloze.questions(bundled.tokenizer, 1, context_tokens=100_000)


def _held_out():
    from secateur.data.documents import held_out
    from secateur.data.interpreter import stdlib_modules

    return [(name, file) for name, file in stdlib_modules().items() if held_out(name)]
