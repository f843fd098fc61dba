"""Run every method on the bundled model and compare with what was recorded: plans, scores and perplexities, to the bit.

    python benchmarks/same_as_before.py              # compare with results/same_as_before.json
    python benchmarks/same_as_before.py --record     # write that file anew, after a change that is meant to change them

A rebuilding changes how things are named and where they are; it must not change a number. Of a plan all numbers count,
whatever the keys are called. Texts are the standard library of the interpreter, so another Python gives other numbers.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

RECORD = Path(__file__).parent / "results" / "same_as_before.json"
EXACT = ["--dtype", "float32"]
READING = ["--texts", "python-stdlib", "--windows", "8", "--seq-len", "128", *EXACT]
CASES: dict[str, list[str]] = {
    "shortgpt": [],
    "uidl": [],
    "last-n": [],
    "streamline": ["--set", "network=none"],
    "shortened-llama": [],
    "sleb": [],
    "swm": ["--set", "rule=weighted"],
    "replaceme": [],
    "slicegpt": [],
    "dynamic-slicing": [],
    "stock-slicing": [],
    "flap": [],
    "wanda-sp": [],
    "llm-pruner": [],
    "minitron-width": [],
    "obs-width": ["--set", "heads=even"],
    "swm:0.5,stock-slicing:0.5": [],
    "auto": ["--set", "trials=4"],
}


def main() -> None:
    """Measure, then record or compare; exit code 1 where anything differs."""
    found = {"python": platform.python_version(), "scores": _scores()} | {name: _cut(name) for name in CASES}
    if "--record" in sys.argv:
        RECORD.write_text(json.dumps(found, indent=1) + "\n")
        return
    before = json.loads(RECORD.read_text())
    if before["python"] != found["python"]:
        print(f"recorded with Python {before['python']}, this is {found['python']}: other texts, other numbers")
    differing = [name for name in before if json.loads(json.dumps(found.get(name))) != before[name]]
    for name in differing:
        print(f"{name}: {_first_difference(before[name], found.get(name))}")
    print(f"{len(before) - len(differing)} of {len(before)} the same")
    sys.exit(bool(differing))


def _scores() -> list[float]:
    return _numbers(_run("score", "bundled", *READING, "--also", "perplexity", "--also", "taylor", "--json"))


def _cut(method: str) -> dict[str, Any]:
    """Plan 20 % less, cut, and measure the perplexity of what was saved."""
    print(method, file=sys.stderr)
    with tempfile.TemporaryDirectory() as name:
        file, folder = Path(name) / "plan.json", Path(name) / "cut"
        amount = ["--method", method, "--remove", "20%", *CASES[method]]
        plan = _run("plan", "bundled", *amount, *READING, "-o", str(file), "--json")
        _run("prune", "bundled", "--plan", str(file), "-o", str(folder), *EXACT, "--json")
        results = _run("eval", str(folder), *READING, "-o", f"{name}/eval", "--json")
    return {
        "parameters": plan["parameters_after"],
        "steps": [
            sorted(_numbers({key: one for key, one in step.items() if key != "settings"})) for step in plan["steps"]
        ],
        "perplexity": results[0]["value"],
    }


def _run(*arguments: str) -> Any:
    with tempfile.TemporaryDirectory() as elsewhere:
        done = subprocess.run(
            [sys.executable, "-m", "secateur", *arguments],
            cwd=elsewhere,
            env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
            capture_output=True,
            text=True,
        )
    if done.returncode:
        sys.exit(f"secateur {' '.join(arguments)}: {done.stderr}")
    return json.loads(done.stdout)


def _numbers(data: Any) -> list[float]:
    """Return all numbers in plain data, in the order in which they come."""
    if isinstance(data, dict):
        return [number for value in data.values() for number in _numbers(value)]
    if isinstance(data, list):
        return [number for value in data for number in _numbers(value)]
    return [data] if isinstance(data, int | float) and not isinstance(data, bool) else []


def _first_difference(before: Any, now: Any) -> str:
    if isinstance(before, dict) and isinstance(now, dict):
        key = next(key for key in before if before[key] != now.get(key))
        return f"{key}: {before[key]} before, {now.get(key)} now"[:300]
    return f"{before} before, {now} now"[:300]


if __name__ == "__main__":
    main()
