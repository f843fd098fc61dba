"""The bundled tokenizer for tests that read text."""

import copy
from pathlib import Path

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

import secateur

BUNDLED = Path(next(iter(secateur.__path__))) / "bundled"


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BUNDLED)


@pytest.fixture(scope="module")
def starting_tokenizer(tokenizer):
    """The bundled tokenizer, changed to start texts with token 0, as those of Llama or Gemma do."""
    starting = copy.deepcopy(tokenizer)
    first = TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    starting.backend_tokenizer.post_processor = first
    return starting
