"""Tiny models for export to GGUF: their tokenizer has merges, without which llama.cpp loads none."""

import dataclasses

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from secateur.models.opening import open_model
from tiny_models import BOS, EOS, PAD, VOCABULARY, save_tiny


def merging_tokenizer():
    """Return a byte-level BPE tokenizer of as many entries as tiny models have embeddings, two of them merged pairs."""
    special = {"<pad>": PAD, "<bos>": BOS, "<eos>": EOS}
    letters = sorted(set(pre_tokenizers.ByteLevel.alphabet()) - set("ýþÿøù"))  # no UTF-8 text has these bytes
    vocabulary = special | {one: number for number, one in enumerate([*letters, "th", "in"], start=len(special))}
    assert len(vocabulary) == VOCABULARY
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("t", "h"), ("i", "n")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", unk_token="<eos>"
    )


def tiny_decoder(name, folder, *, blocks=4, **settings):
    """Save a tiny model, open it in float32, and give it the tokenizer above."""
    save_tiny(name, folder, blocks=blocks)
    decoder = open_model(folder, dtype="float32", **settings)
    return dataclasses.replace(decoder, tokenizer=merging_tokenizer(), other_tokenizer=True)
