"""Instruction data: questions and answers, with a loss on the answers only.

Two formats are read from files (jsonl, json, csv, parquet) and from Hub data sets: chats, `messages` with
`role` and `content` or ShareGPT's `conversations` with `from` and `value`,
rendered with the tokenizer's chat template; and Alpaca's `instruction`, `input` and `output` (Taori et al. 2023), which
become a chat if the tokenizer has a template, and plain text with headings otherwise.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from secateur.data.cutting import wants_bos
from secateur.data.sources import open_rows
from secateur.data.templates import ChatRenderer
from secateur.errors import InputError
from secateur.training.data import IGNORED

Message = dict[str, str]


@dataclass
class InstructionData(Dataset[dict[str, torch.Tensor]]):
    """Examples as items: `tokens`, `mask` and `labels`, all (T,), padded on the right.

    Attributes:
        rows: token ids of each example, and which of them count in the loss.
        seq_len: T.
        padding: token id of padding.
        source: the source as the user wrote it.
        fingerprint: of tokens and labels.
        notes: remarks for the user.
    """

    rows: list[tuple[list[int], list[bool]]]
    seq_len: int
    padding: int
    source: str
    fingerprint: str
    notes: tuple[str, ...] = field(default=())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        ids, learnt = self.rows[item]
        missing = self.seq_len - len(ids)
        labels = [token if is_learnt else IGNORED for token, is_learnt in zip(ids, learnt, strict=True)]
        return {
            "tokens": torch.tensor(ids + [self.padding] * missing),
            "mask": torch.arange(self.seq_len) < len(ids),
            "labels": torch.tensor(labels + [IGNORED] * missing),
        }

    @property
    def token_count(self) -> int:
        """Tokens in all examples, without padding."""
        return sum(len(ids) for ids, _ in self.rows)

    def part(self, numbers: range) -> InstructionData:
        """Return the examples with these numbers."""
        rows = [self.rows[number] for number in numbers]
        return InstructionData(rows, self.seq_len, self.padding, self.source, self.fingerprint)

    def describe(self) -> dict[str, Any]:
        """Return everything but the tokens as plain data."""
        return {
            "source": self.source,
            "fingerprint": self.fingerprint,
            "instructions": True,
            "windows": len(self),
            "seq_len": self.seq_len,
            "notes": list(self.notes),
        }


def open_instructions(
    source: str, tokenizer: PreTrainedTokenizerBase | None, *, examples: int, seq_len: int, seed: int = 0
) -> InstructionData:
    """Read at most `examples` examples, shuffled; longer ones than `seq_len` are truncated if an answer remains.

    Raises:
        InputError: no tokenizer, a source without instruction data, a chat without a chat template, or nothing usable.
    """
    if tokenizer is None:
        raise InputError(f"no tokenizer to read '{source}' with; give one.")
    renderer = ChatRenderer(tokenizer) if tokenizer.chat_template is not None else None
    rows, cut, empty = list[tuple[list[int], list[bool]]](), 0, 0
    for messages in _conversations(source, seed):
        ids, learnt = _encoded(messages, tokenizer, renderer, source)
        cut += len(ids) > seq_len
        ids, learnt = ids[:seq_len], learnt[:seq_len]
        if not any(learnt[1:]):
            empty += 1
            continue
        rows.append((ids, learnt))
        if len(rows) == examples:
            break
    if not rows:
        raise InputError(f"{source}: no example with an answer within {seq_len} tokens; take a longer --seq-len.")
    random.Random(seed).shuffle(rows)
    counted = {f"examples cut to {seq_len} tokens": cut, "examples without an answer within them skipped": empty}
    digest = hashlib.sha256(repr(rows).encode()).hexdigest()[:16]
    padding = next(one for one in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if one is not None)
    notes = tuple(f"{number} {what}" for what, number in counted.items() if number)
    return InstructionData(rows, seq_len, padding, source, f"{source}:sha256:{digest}", notes)


def _conversations(source: str, seed: int) -> Iterator[list[Message]]:
    for number, row in enumerate(open_rows(source, seed)):
        if isinstance(row.get("messages"), list) and row["messages"]:
            yield [_turn(one, "role", "content", f"{source}, row {number + 1}") for one in row["messages"]]
        elif isinstance(row.get("conversations"), list) and row["conversations"]:
            turns = [_turn(one, "from", "value", f"{source}, row {number + 1}") for one in row["conversations"]]
            yield [one | {"role": _role(one["role"])} for one in turns]
        elif row.get("instruction") and row.get("output"):
            asked = "\n\n".join(str(row[key]) for key in ("instruction", "input") if row.get(key))
            yield [{"role": "user", "content": asked}, {"role": "assistant", "content": str(row["output"])}]
        elif number == 0:
            raise InputError(
                f"{source}: no instruction data: a row has {', '.join(sorted(row)) or 'nothing'}; wanted are "
                "'messages', or 'instruction' and 'output'."
            )


def _turn(one: Any, role: str, content: str, where: str) -> Message:
    if not isinstance(one, dict) or not {role, content} <= one.keys():
        raise InputError(f"{where}: a turn of a chat needs '{role}' and '{content}'.")
    return {"role": str(one[role]), "content": str(one[content])}


def _role(speaker: str) -> str:
    """Return the role by which chat templates know one of ShareGPT's speakers."""
    return {"human": "user", "gpt": "assistant"}.get(speaker, speaker)


def _encoded(
    messages: list[Message], tokenizer: PreTrainedTokenizerBase, renderer: ChatRenderer | None, source: str
) -> tuple[list[int], list[bool]]:
    """Return the token ids of a conversation, and which of them the assistant writes (including its end of turn)."""
    ids: list[int] = []
    learnt: list[bool] = []
    for number, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = _rendered(messages[:number], tokenizer, renderer, source, asks=True)
        after = _rendered(messages[: number + 1], tokenizer, renderer, source, asks=False)
        if not after.startswith(before):
            raise InputError(f"{source}: the chat template rewrites earlier turns, so answers cannot be told apart.")
        start, end = (len(_tokens(text, tokenizer)) for text in (before, after))
        ids = _tokens(after, tokenizer)
        learnt += [False] * (start - len(learnt)) + [True] * (end - max(start, len(learnt)))
    learnt = learnt[: len(ids)] + [True] * (len(ids) - len(learnt))
    if tokenizer.chat_template is None and wants_bos(tokenizer, "auto"):  # a template writes its own
        return [tokenizer.bos_token_id, *ids], [False, *learnt]
    return ids, learnt


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    found: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return found


def _rendered(
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    renderer: ChatRenderer | None,
    source: str,
    *,
    asks: bool,
) -> str:
    if renderer is None:
        return _headed(messages, source, asks=asks, end=tokenizer.eos_token or "")
    try:
        return renderer.render(messages, asks=asks)
    except InputError as error:
        raise InputError(f"{source}: {error}") from error


def _headed(messages: list[Message], source: str, *, asks: bool, end: str) -> str:
    """Return prompt and answer as text, for a tokenizer without a chat template."""
    if [one["role"] for one in messages] not in (["user"], ["user", "assistant"]):
        raise InputError(
            f"{source}: chat messages, but the tokenizer has no chat template; give one (--tokenizer FOLDER), or data "
            "with 'instruction' and 'output'."
        )
    asked = f"### Instruction:\n{messages[0]['content']}\n\n### Response:\n"
    return asked if asks else f"{asked}{messages[1]['content']}{end}"
