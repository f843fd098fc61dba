"""Greedy continuations of held-out text, to show how a model writes."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch

from secateur.data.texts import Texts, windows_for
from secateur.errors import InputError
from secateur.models.decoder import Decoder


@dataclass(frozen=True)
class Sample:
    """One continuation.

    Attributes:
        prompt: the text the model was given.
        text: its continuation.
        truth: the real continuation.
    """

    prompt: str
    text: str
    truth: str

    def as_dict(self) -> dict[str, str]:
        """Return the sample as plain data."""
        return asdict(self)


def write_samples(model: Decoder, texts: Texts = None, *, prompts: int = 2, tokens: int = 48) -> list[Sample]:
    """Return a model's continuations of the beginnings of held-out windows.

    Args:
        model: the open model; a skeleton is read into memory.
        texts: see `secateur texts`; the held-out part is taken.
        prompts: number of continuations.
        tokens: length of a prompt, and of its continuation.

    Raises:
        InputError: unusable texts, no tokenizer, or windows shorter than a prompt and its continuation.
    """
    if model.tokenizer is None:
        raise InputError(f"{model.source}: samples need a tokenizer, and there is none; give one (--tokenizer).")
    length = 2 * tokens
    if model.max_positions is not None and length > model.max_positions:
        raise InputError(f"{length} tokens of prompt and continuation: {model.source} reads {model.max_positions}.")
    windows = windows_for(model, texts, windows=prompts, seq_len=length, split="held-out")
    samples = []
    with model.whole() as module, torch.inference_mode():
        for row in windows.tokens[:prompts]:
            prompt = row[None, :tokens].to(model.device)
            written = module.generate(
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=tokens,
                do_sample=False,
                pad_token_id=model.tokenizer.eos_token_id,
            )
            parts = (row[:tokens], written[0, tokens:], row[tokens:])
            samples.append(Sample(*(str(model.tokenizer.decode(part, skip_special_tokens=True)) for part in parts)))
    return samples
