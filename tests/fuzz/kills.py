"""Commands that are killed at random moments and started again, by hand: `python tests/fuzz/kills.py --kills 60`.

Each command runs once undisturbed. Then it runs over an earlier result, is killed (SIGKILL) or ended (SIGTERM) at a
random moment, and is started again. What must hold: the earlier result is never lost on the way, all children end, and
after the second run everything is as in the undisturbed one, byte for byte but for times, with nothing else beside it.
The counts are appended to `benchmarks/results/robustness.jsonl`.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]

import numpy as np
import peft  # noqa: F401
import psutil
import torch
from common import keep
from transformers.utils import logging

import secateur.cli.evaluate
import secateur.cli.main as cli
import secateur.cli.prune
import secateur.cli.study  # noqa: F401
from tiny_models import VOCABULARY, save_tiny

COMMANDS = {
    "prune": "prune model --method obs-width --remove {share} --texts windows.npy -o out",
    "heal": (
        "heal model --with lora --texts windows.npy --set batch_size=8 --set epochs={epochs} --set save_minutes=0.001 "
        "--no-check -o out"
    ),
    "plan auto": "plan model --method auto --remove {share} --set trials=8 --texts windows.npy -o out.json",
    "compare": "run study.yaml -o out",
    "run": "run {recipe}.yaml -o out",
    "convert": "convert model --save-dtype {dtype} --no-check -o out",
    "export": "export bundled --type {kind} --no-check -o out.gguf",
}
EARLIER = {"share": "15%", "epochs": "1", "recipe": "earlier", "dtype": "float16", "kind": "f16"}
NOW = {"share": "30%", "epochs": "2", "recipe": "now", "dtype": "bfloat16", "kind": "f32"}
RESUMES_IN_PLACE = ("compare", "run")
"""Commands whose folder is not replaced but completed, stage by stage; an earlier result there is of the same run."""

RECIPE = """model: model
texts: windows.npy
prune: {{method: auto, remove: {share}, settings: {{trials: 4}}}}
heal: {{with: lora, tokens: 500, settings: {{batch_size: 4, save_minutes: 0.001}}}}
eval: {{windows: 4}}
generate: {{prompts: 1, tokens: 8}}
check: false
"""
STUDY = """model: model
texts: windows.npy
compare:
  methods: [swm]
  remove: [30%]
  heal: [none, {with: lora, tokens: 256, settings: {batch_size: 4, save_minutes: 0.001}}]
eval: {windows: 4}
check: false
"""
_TIMES = re.compile(rb'"(created|applied|seconds|tokens_per_second)": ("[^"]*"|[-+0-9.e]+)|\d{4}-\d\d-\d\d[T \d:+-]*')
"""What a file says about when and how fast it was written."""


@dataclass
class Counts:
    """What came of all kills."""

    kills: int = 0
    ended_before: int = 0
    differences: list[str] = field(default_factory=list)
    left_over: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    survivors: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--commands", nargs="*", default=list(COMMANDS))
    parser.add_argument("--no-record", action="store_true", help="only print")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    counts, begun, draw = Counts(), time.monotonic(), random.Random(given.seed)
    with tempfile.TemporaryDirectory() as scratch:
        place = _make_place(Path(scratch))
        expected = {}
        for name in given.commands:
            _clear(place)
            expected[name] = _undisturbed(place, name)
            print(f"{name}: {expected[name][1]:.1f} seconds undisturbed", flush=True)
        while counts.kills - counts.ended_before < given.kills:  # a kill after the end interrupts nothing
            name = given.commands[counts.kills % len(given.commands)]
            number = signal.SIGTERM if draw.random() < 0.3 else signal.SIGKILL
            _kill_once(place, name, expected[name], draw.random(), number, counts)
    found: dict[str, Any] = {
        "kills": counts.kills,
        "ended_before": counts.ended_before,
        "differences": len(counts.differences),
        "left_over": len(counts.left_over),
        "lost_targets": len(counts.lost),
        "surviving_processes": len(counts.survivors),
        "failed_reruns": len(counts.failures),
        "seconds": round(time.monotonic() - begun),
    }
    print(found)
    if not given.no_record:
        keep("robustness", {"run": "kills", "seed": given.seed, "commands": given.commands}, found)


def _make_place(scratch: Path) -> Path:
    place = scratch / "place"
    place.mkdir()
    for name, folder in (("TMPDIR", "tmp"), ("SECATEUR_CACHE", "cache")):
        os.environ[name] = str(scratch / folder)
        (scratch / folder).mkdir()
    tempfile.tempdir = None
    os.chdir(place)
    save_tiny("llama", "model", tokenizer=True, blocks=5)
    np.save("windows.npy", np.random.default_rng(0).integers(3, VOCABULARY, (32, 16)))
    Path("study.yaml").write_text(STUDY)
    for name, share in (("earlier", 0.15), ("now", 0.3)):
        Path(f"{name}.yaml").write_text(RECIPE.format(share=share))
    return place


def _clear(place: Path) -> None:
    for path in [*place.glob("out*"), *place.glob(".out*"), *Path(tempfile.gettempdir()).iterdir()]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def _undisturbed(place: Path, name: str) -> tuple[dict[str, str], float]:
    begun = time.monotonic()
    code = _wait(_start(COMMANDS[name].format(**NOW)))
    assert code == 0, Path("said.txt").read_text()
    return _contents(place), time.monotonic() - begun


def _start(words: str) -> int:
    """Run a command in a child, with a session of its own; return its process number."""
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        os.setsid()
        out = os.open("said.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        sys.argv = ["secateur", *words.split()]
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = stop.code or 0
    except BaseException:  # noqa: BLE001 - the traceback is the finding
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _wait(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_once(
    place: Path, name: str, expected: tuple[dict[str, str], float], when: float, number: int, counts: Counts
) -> None:
    """Run over an earlier result, kill, look, run again, and look again."""
    _clear(place)
    words, (contents, seconds) = COMMANDS[name].format(**NOW), expected
    earlier = {}
    if name not in RESUMES_IN_PLACE:
        assert _wait(_start(COMMANDS[name].format(**EARLIER))) == 0, Path("said.txt").read_text()
        earlier = _contents(place)
    child = _start(words)
    time.sleep(when * seconds)
    os.kill(child, number)
    code = _wait(child)
    counts.kills += 1
    counts.ended_before += code == 0
    where = f"{name}, {signal.Signals(number).name} after {when * seconds:.1f} of {seconds:.1f} seconds"
    if code not in (0, -signal.SIGKILL if number == signal.SIGKILL else 128 + number):
        counts.failures.append(f"{where}: code {code}: {Path('said.txt').read_text()[-2000:]}")
    alive = _survivors(place)
    counts.survivors += [f"{where}: {one}" for one in alive]
    between = _contents(place, hidden=False)
    if earlier and not any(_holds(between, one) for one in (earlier, contents)):
        counts.lost.append(f"{where}: {sorted(between)}")
    again = _wait(_start(words))
    if again != 0:
        counts.failures.append(f"{where}: started again: code {again}: {Path('said.txt').read_text()[-2000:]}")
    found = _contents(place)
    differing = [path for path in contents if found.get(path) != contents[path]]
    counts.differences += [f"{where}: {path}" for path in differing]
    counts.left_over += [f"{where}: {path}" for path in found if path not in contents]
    problems = (counts.failures, counts.survivors, counts.lost, counts.differences, counts.left_over)
    print(f"{counts.kills}. {where}: code {code}", flush=True)
    for line in (line for lines in problems for line in lines if line.startswith(where)):
        print("   ", line, flush=True)


def _holds(between: dict[str, str], one: dict[str, str]) -> bool:
    return all(between.get(path) == content for path, content in one.items())


def _survivors(place: Path) -> list[str]:
    """Return the commands of processes that still work here, ten seconds after the kill."""
    for _ in range(100):
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                words = " ".join(process.cmdline())
                if str(place.parent) in words and process.pid != os.getpid():
                    found.append(words)
        if not found:
            return []
        time.sleep(0.1)
    return found


def _contents(place: Path, *, hidden: bool = True) -> dict[str, str]:
    """Return a digest of every file of the result, of what lies beside it and of temporary files, without times."""
    found = {}
    roots = [*place.glob("out*"), *(place.glob(".out*") if hidden else ())]
    for root in [*roots, *Path(tempfile.gettempdir()).iterdir()] if hidden else roots:
        for path in [root, *root.rglob("*")]:
            if path.name == "log.txt":  # of the process that ran a cell, another one after a kill
                continue
            content = b"" if path.is_dir() else path.read_bytes()
            if path.suffix in (".json", ".jsonl", ".md", ".yaml", ".html"):
                content = _TIMES.sub(b"", content)
            found[str(path.relative_to(place.parent))] = hashlib.sha256(content).hexdigest()
    return found


if __name__ == "__main__":
    main()
