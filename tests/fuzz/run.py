"""The long run of the fuzzer, by hand: `PYTHONPATH=tests python tests/fuzz/run.py --mutations 2000`.

Every kind of file is mutated equally often, and the command that reads it runs in a child of this process, so that one
that dies takes nothing with it. Findings are printed; the counts are appended to `benchmarks/results/robustness.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "benchmarks")]

import torch
from common import keep
from transformers.utils import logging

from fuzz.kinds import KINDS, SECONDS, Finding, make_place, try_one

_CHUNK = 40
_MEMORY = 32 << 30
"""Address space of a child: whoever asks for more is found by the error, not by what it does to the machine."""


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--mutations", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="of the first mutation of each kind; the next has one more")
    parser.add_argument("--kinds", nargs="*", default=list(KINDS))
    parser.add_argument("--no-record", action="store_true", help="only print")
    given = parser.parse_args()
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["SECATEUR_CACHE"] = f"{scratch}/cache"
        place = make_place(Path(scratch, "place"))
        cases = [(kind, given.seed + n // len(given.kinds)) for n, kind in _dealt(given.kinds, given.mutations)]
        findings = []
        for finding in _tried(place, cases):
            findings.append(finding)
            if not finding.fine:
                print(json.dumps(asdict(finding), indent=1), flush=True)
    codes = Counter(str(finding.code) if finding.fine else f"bad {finding.code}" for finding in findings)
    found = {
        "mutations": len(findings),
        "tracebacks": sum(not one.fine and one.code not in ("hung", "crash") for one in findings),
        "hangs": codes["bad hung"],
        "crashes": codes["bad crash"],
        "accepted": codes["0"],
        "refused": codes["2"],
        "slowest_seconds": max(one.seconds for one in findings),
        "seconds": round(time.monotonic() - begun),
    }
    print(found)
    if not given.no_record:
        keep("robustness", {"run": "mutations", "seed": given.seed, "kinds": len(given.kinds), "limit": SECONDS}, found)


def _dealt(kinds: list[str], count: int) -> Iterator[tuple[int, str]]:
    return ((number, kinds[number % len(kinds)]) for number in range(count))


def _tried(place: Path, cases: list[tuple[str, int]]) -> Iterator[Finding]:
    """Try all cases, some in each child; a child that dies is found in the case it was at, and the next goes on."""
    done = 0
    while done < len(cases):
        results, child = _child(place, cases[done : done + _CHUNK])
        count = 0
        for line in results:
            yield Finding(**json.loads(line))
            count += 1
        _, status = os.waitpid(child, 0)
        done += count
        if count < len(cases[done - count : done - count + _CHUNK]):
            kind, seed = cases[done]
            code = "hung" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGVTALRM else "crash"
            yield Finding(kind, seed, "", code, 0.0, f"wait status {status}")
            done += 1
            _put_right(place)


def _child(place: Path, cases: list[tuple[str, int]]) -> tuple[Iterator[str], int]:
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return os.fdopen(read), child
    try:
        os.close(read)
        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
        with os.fdopen(write, "w") as out:
            for kind, seed in cases:
                # a command that does not even notice the alarm of its time limit is ended by the system
                signal.setitimer(signal.ITIMER_VIRTUAL, 3 * SECONDS)
                out.write(json.dumps(asdict(try_one(place, kind, seed))) + "\n")
                out.flush()
    finally:
        os._exit(0)


def _put_right(place: Path) -> None:
    """Undo what a child that died had mutated: make the place anew."""
    import shutil

    shutil.rmtree(place)
    make_place(place)


if __name__ == "__main__":
    main()
