"""Training data of healing: running text, or instruction data."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from secateur.data.texts import DEFAULT_SEQ_LEN, windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.healing.instructions import InstructionData, open_instructions
from secateur.models.decoder import Decoder
from secateur.plan.amount import read_count
from secateur.run_options import RunOptions

Data = Windows | InstructionData


@dataclass(frozen=True, kw_only=True)
class TrainingTexts:
    """The texts a model is trained on, and how much of them.

    Attributes:
        source: see `secateur texts`; None is `diverse`.
        tokens: maximum number of tokens (also "10M"); every token is seen once unless `epochs` says otherwise.
        instructions: the texts are instruction data (chat messages, or Alpaca's fields); the loss covers answers only.
        seq_len: tokens per window; None takes 512, or the model's positions if those are fewer.
    """

    source: str | None = None
    tokens: int | str = 1_000_000
    instructions: bool = False
    seq_len: int | None = None

    @property
    def token_count(self) -> int:
        """Tokens as a number.

        Raises:
            InputError: not a positive number.
        """
        return int(read_count(self.tokens, "tokens"))

    def check(self) -> None:
        """Check what can be checked without a model.

        Raises:
            InputError: an invalid number of tokens, or instruction data without a source.
        """
        self.token_count  # noqa: B018 - raises
        if self.instructions and self.source is None:
            raise InputError("instruction data need a source (--texts alpaca, or a jsonl file).")


def training_data(
    model: Decoder, texts: TrainingTexts | Data | Any, tokens: int | str | None = None, *, seed: int = 0
) -> Data:
    """Open the training data of a model.

    Raises:
        InputError: unusable or too little data.
    """
    if isinstance(texts, Windows | InstructionData):
        return texts
    asked = texts if isinstance(texts, TrainingTexts) else TrainingTexts(source=None if texts is None else str(texts))
    asked = asked if tokens is None else replace(asked, tokens=tokens)
    length = asked.seq_len or min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    windows = asked.token_count // length
    if windows < 2:
        raise InputError(f"{asked.token_count} tokens are fewer than two windows of {length}; give more tokens.")
    asked.check()
    if asked.instructions:
        return open_instructions(str(asked.source), model.tokenizer, examples=windows, seq_len=length, seed=seed)
    return windows_for(model, asked.source, windows=windows, seq_len=length, options=RunOptions(seed=seed))
