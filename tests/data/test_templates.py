"""Chat templates are rendered as transformers renders them, and those that never end are given up."""

import pytest

from secateur.data.templates import ChatRenderer
from secateur.errors import InputError
from secateur.models.opening import open_model
from tiny_models import CHAT_TEMPLATE

ASKED = [{"role": "user", "content": "What?\nü\U0001f600"}, {"role": "assistant", "content": "That."}]


@pytest.fixture(scope="module")
def tokenizer(tiny_with_tokenizer):
    found = open_model(tiny_with_tokenizer).tokenizer
    found.chat_template = CHAT_TEMPLATE
    return found


@pytest.fixture(scope="module")
def renderer(tokenizer):
    """One process for all templates; it is limited to one second each."""
    return ChatRenderer(tokenizer, seconds=1)


@pytest.mark.parametrize("asks", [True, False])
def test_it_is_what_transformers_renders(renderer, tokenizer, asks):
    expected = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=asks)
    assert renderer.render(ASKED, asks=asks) == expected


HOSTILE = {
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a number that takes years": "{{ 7 ** (10 ** 9) }}",
    "filled memory": "{% set n = namespace(x='a') %}{% for i in range(60) %}{% set n.x = n.x * 9 %}{% endfor %}",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_a_template_that_does_not_end_is_given_up(renderer, monkeypatch, name):
    monkeypatch.setitem(renderer._fixed, "chat_template", HOSTILE[name])
    with pytest.raises(InputError, match=r"took more than 1 seconds|too much memory"):
        renderer.render(ASKED, asks=True)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system role') }}", "{% if %}", "{{ x.__class__.mro() }}"])
def test_a_template_that_refuses_is_told(renderer, monkeypatch, template):
    monkeypatch.setitem(renderer._fixed, "chat_template", template)
    with pytest.raises(InputError, match="the chat template refuses a conversation"):
        renderer.render(ASKED, asks=True)
