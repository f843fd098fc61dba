"""What it is worth that waiting threads sleep early, as the command line sets it (`GOMP_SPINCOUNT`), busy or not.

    python benchmarks/busy_machine.py [ROUNDS]

A forward pass of a random Llama and an eigendecomposition on all cores, each in a process of its own, with the setting
and without in turn; once alone and once beside as many processes that compute without pause as there are cores.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import Any

import torch
from common import keep, random_llama

from secateur.cli.main import SPINS

WIDTH, LENGTH, TIMES = 576, 512, 3
_BUSY = "while True: pass"


def main(rounds: int = 3) -> None:
    """Time both ways in turn, alone and beside others."""
    cores = os.cpu_count() or 1
    for others in (0, cores):
        with ExitStack() as stack:
            for _ in range(others):
                process = stack.enter_context(subprocess.Popen([sys.executable, "-c", _BUSY]))
                stack.callback(process.kill)
            seconds: dict[str, list[dict[str, float]]] = {"early": [], "late": []}
            for _ in range(rounds):
                for name in seconds:
                    seconds[name].append(_in_a_process({"GOMP_SPINCOUNT": SPINS} if name == "early" else {}))
        found: dict[str, Any] = {}
        for work in ("forward", "eigh"):
            pairs = [(a[work], b[work]) for a, b in zip(seconds["late"], seconds["early"], strict=True)]
            found |= {
                f"{work}_late_s": round(statistics.median(late for late, _ in pairs), 4),
                f"{work}_early_s": round(statistics.median(early for _, early in pairs), 4),
                f"{work}_ratio": round(statistics.median(late / early for late, early in pairs), 2),
            }
        keep("busy_machine", {"others": others, "rounds": rounds, "width": WIDTH, "tokens": LENGTH}, found)


def _in_a_process(setting: dict[str, str]) -> dict[str, float]:
    plain = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_NUM_THREADS")}
    run = subprocess.run(
        [sys.executable, __file__, "--child"], env=plain | setting, check=True, capture_output=True, text=True
    )
    forward, eigh = map(float, run.stdout.split()[-2:])
    return {"forward": forward, "eigh": eigh}


@torch.no_grad()
def measure() -> None:
    """Print the median seconds of a forward pass, and of an eigendecomposition."""
    model = random_llama(width=WIDTH, blocks=6).module
    tokens = torch.randint(0, 8192, (1, LENGTH), generator=torch.Generator().manual_seed(0))
    square = torch.randn(WIDTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    square = square @ square.T
    for run in (lambda: model(tokens), lambda: torch.linalg.eigh(square)):
        run()
        taken = []
        for _ in range(TIMES):
            begin = time.perf_counter()
            run()
            taken.append(time.perf_counter() - begin)
        print(statistics.median(taken))


if __name__ == "__main__":
    if sys.argv[1:] == ["--child"]:
        measure()
    else:
        main(*map(int, sys.argv[1:]))
