"""The kinds of file that are mutated: how a good one is made, and the command that reads it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np

import secateur.cli.main as cli
from fuzz.mutations import mutate, remove
from gguf_files import small_llama, small_tokenizer, write_gguf
from tiny_models import CHAT_TEMPLATE, VOCABULARY, save_tiny

SECONDS = 20
"""Time after which a command counts as hanging."""


@dataclass(frozen=True)
class Kind:
    """One kind of file.

    Attributes:
        file: the file in the place that is mutated.
        words: the command that reads it, in that place.
        resets: what the command may change there, besides `out`.
    """

    file: str
    words: str
    resets: tuple[str, ...] = ()


_SCORE = "score model --windows 2 --seq-len 16 -o out --texts "
_CUT = "prune {} --method last-n --blocks 1 --no-check -o out"
_HEAL = "heal model --texts windows.npy --set batch_size=2 --set evaluations=1 --no-check -o healed"

KINDS = {
    "plan": Kind("plan.json", "prune model --plan plan.json --no-check -o out"),
    "recipe": Kind("recipe.yaml", "run recipe.yaml --dry-run -o out"),
    "study": Kind("study.yaml", "run study.yaml --dry-run -o out"),
    "config": Kind("model/config.json", _CUT.format("model")),
    "config, block by block": Kind("model/config.json", _CUT.format("model --skeleton")),
    "config of uneven shapes": Kind("uneven/config.json", "inspect uneven --trust-remote-code"),
    "index": Kind("sharded/model.safetensors.index.json", _CUT.format("sharded")),
    "weights": Kind("model/model.safetensors", _CUT.format("model")),
    "weights, block by block": Kind("model/model.safetensors", _CUT.format("model --skeleton")),
    "generation settings": Kind("model/generation_config.json", _CUT.format("model")),
    "tokenizer": Kind("model/tokenizer.json", _SCORE + "text.txt"),
    "tokenizer settings": Kind("model/tokenizer_config.json", _SCORE + "text.txt"),
    "chat template": Kind("model/chat_template.jinja", _SCORE + "self"),
    "scores": Kind(
        "scores.json", "plan model --method shortgpt --blocks 1 --texts windows.npy --scores scores.json -o out.json"
    ),
    "record": Kind("cut/secateur.json", _CUT.format("cut")),
    "record, reported": Kind("cut/secateur.json", "report cut -o out.html"),
    "results": Kind("eval/results.jsonl", "report eval -o out.html"),
    "state of a run": Kind("run/state.json", "run recipe.yaml -o run", ("run",)),
    "recipe of a run": Kind("run/recipe.yaml", "report run -o out.html"),
    "text": Kind("text.txt", _SCORE + "text.txt"),
    "lines of JSON": Kind("rows.jsonl", _SCORE + "rows.jsonl"),
    "list of JSON": Kind("rows.json", _SCORE + "rows.json"),
    "table": Kind("rows.csv", _SCORE + "rows.csv"),
    "parquet": Kind("rows.parquet", _SCORE + "rows.parquet"),
    "windows": Kind("windows.npy", _SCORE + "windows.npy"),
    "instructions": Kind("chat.jsonl", "heal model --instructions --texts chat.jsonl --tokens 64 --dry-run -o out"),
    "recipe of training": Kind("healed.training/recipe.json", _HEAL, ("healed.training",)),
    "log of training": Kind("healed.training/log.jsonl", _HEAL, ("healed.training",)),
    "GGUF": Kind("model.gguf", "inspect model.gguf"),
}


def make_place(folder: Path) -> Path:
    """Make a folder with a good file of every kind."""
    folder.mkdir(parents=True)
    with contextlib.chdir(folder):
        save_tiny("llama", "model", tokenizer=True, blocks=4)
        Path("model/chat_template.jinja").write_text(CHAT_TEMPLATE)
        save_tiny("llama", "sharded", blocks=4, max_shard_size="20KB", tokenizer=True)
        save_tiny("secateur", "uneven", blocks=4)
        draw = random.Random(0)
        words = ["the", "model", "reads", "text", "and", "numbers", "like", "12", "or", "3.5", "every", "day"]
        lines = [" ".join(draw.choices(words, k=20)) for _ in range(40)]
        Path("text.txt").write_text("\n".join(lines))
        Path("rows.jsonl").write_text("".join(json.dumps({"text": line, "id": 1}) + "\n" for line in lines))
        Path("rows.json").write_text(json.dumps([{"text": line, "id": 1} for line in lines]))
        Path("rows.csv").write_text("text,id\n" + "".join(f"{line},1\n" for line in lines))
        chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because it is."}]
        Path("chat.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for _ in range(8)))
        _parquet(lines)
        np.save("windows.npy", np.random.default_rng(0).integers(3, VOCABULARY, (8, 16)))
        Path("recipe.yaml").write_text(RECIPE)
        Path("study.yaml").write_text(STUDY)
        tokenizer = small_tokenizer()
        write_gguf("model.gguf", small_llama(len(tokenizer)), tokenizer)
        for words_ in PREPARED:
            code, said = command(words_)
            assert code == 0, said
        _keep_training()
    return folder


RECIPE = """model: model
description: a small run
texts: windows.npy
prune: {method: last-n, blocks: 1, settings: {protect_last: 1}}
eval: {windows: 2}
check: false
"""
STUDY = """model: model
texts: windows.npy
compare:
  methods: [last-n, {method: shortgpt, settings: {protect_first: 1}}]
  remove: [20%, 0.3]
  heal: [none, {with: lora, tokens: 1000}]
eval: {windows: 2, seq_len: 16}
bench: {batch_sizes: [1], prompts: [8], new_tokens: 4}
"""
PREPARED = (
    "plan model --method shortgpt --blocks 1 --texts windows.npy -o plan.json",
    "score model --texts windows.npy -o scored",
    "prune model --plan plan.json --no-check -o cut",
    "eval model --texts windows.npy -o eval",
    "run recipe.yaml -o run",
)


def _parquet(lines: list[str]) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"text": lines, "id": list(range(len(lines)))}), "rows.parquet")


def _keep_training() -> None:
    """Heal, and stop before the result is saved, so that the folder of states is still there."""
    shutil.copyfile("scored/scores.json", "scores.json")
    with mock.patch("secateur.cli.prune.save", side_effect=KeyboardInterrupt):
        code, said = command(_HEAL)
    assert code == 130, said
    assert Path("healed.training/log.jsonl").is_file()


class Hung(BaseException):
    """A command took too long."""


def command(words: str) -> tuple[int | str, str]:
    """Run a command line in this process; return its exit code, or what it died of, and what it said."""
    said = io.StringIO()
    before, sys.argv = sys.argv, ["secateur", *words.split()]
    code: int | str = 0
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()), _time_limit():
            cli.main()
    except SystemExit as stop:
        code = stop.code or 0
    except Hung:
        code = "hung"
    except BaseException:  # noqa: BLE001 - everything that leaves the command line is a finding
        code = "traceback"
        said.write(traceback.format_exc())
    finally:
        sys.argv = before
    return code, said.getvalue()


@contextlib.contextmanager
def _time_limit() -> Iterator[None]:
    def end(*_: Any) -> None:
        raise Hung

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Finding:
    """What came of one mutation.

    Attributes:
        kind, seed: which; the same two give the same mutation.
        did: what was done to the file.
        code: the exit code, or `traceback`, `hung`, `crash`.
        seconds: how long it took.
        said: what the command said.
    """

    kind: str
    seed: int
    did: str
    code: int | str
    seconds: float
    said: str

    @property
    def fine(self) -> bool:
        """Return whether the command ended as a command should: done, or one message."""
        return self.code == 0 or (self.code == 2 and "error:" in self.said) or (self.code == 2 and "Usage" in self.said)


def try_one(place: Path, kind: str, seed: int) -> Finding:
    """Mutate one file, run the command that reads it, and put everything back."""
    row, draw = KINDS[kind], random.Random(f"{kind}:{seed}")
    with contextlib.chdir(place):
        held = [(name, Path(f".held-{number}")) for number, name in enumerate((row.file, *row.resets))]
        for name, aside in held:
            (shutil.copytree if Path(name).is_dir() else shutil.copyfile)(name, aside)
        began = time.monotonic()
        try:
            did = mutate(Path(row.file), draw)
            code, said = command(row.words)
        finally:
            for out in ("out", "out.json", "out.html", "healed"):
                remove(Path(out))
            remove(Path(row.file))
            for name, aside in held[::-1]:
                remove(Path(name))
                os.rename(aside, name)
    return Finding(kind, seed, did, code, round(time.monotonic() - began, 2), said)
