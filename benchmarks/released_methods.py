"""Methods as others release them (written plainly from their papers) beside secateur's, at equal true parameters.

    python benchmarks/released_methods.py FILE.gguf WIKITEXT.txt [CASE …] [--remove SHARE] [--windows N] [--length N]

A case is a name of `plain_methods.py`, such as `sleb`: the plain method and what secateur offers instead, each in a
process of its own, with the same calibration windows. Seconds and peak memory are of pruning alone; 16 windows of 512
held-out tokens of each source judge both. What stands in `results/released_methods.jsonl` is not measured again.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import plain_methods
from common import LENGTH, RESULTS, keep, peak, texts_that_judge
from plain_methods import parameters

import secateur
from secateur.data.texts import windows_for
from secateur.models.decoder import Decoder

OURS = {"optipfair": "obs-width"}
"""What secateur offers instead, where it is not the method of the same name."""
JUDGED = 16
NAME = "released_methods"


def main() -> None:
    """Measure the dense model, then both sides of each case."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("wikitext", type=Path)
    parser.add_argument("cases", nargs="*", default=list(plain_methods.METHODS))
    parser.add_argument("--remove", type=float, default=0.2)
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=LENGTH)
    parser.add_argument("--texts", help="what is calibrated on; by default what secateur calibrates on")
    parser.add_argument("--side", choices=("dense", "plain", "secateur"), help="measure this here and now")
    given = parser.parse_args()
    if given.side:
        measure(given, given.side, given.cases[0] if given.side != "dense" else None)
        return
    for case in (None, *given.cases):
        for side in ("plain", "secateur") if case else ("dense",):
            if setting_of(given, side, case) not in known():
                cases = [case] if case else []
                command = [sys.executable, __file__, given.file, str(given.wikitext), *cases, "--side", side]
                command += ["--remove", str(given.remove), "--windows", str(given.windows)]
                command += ["--length", str(given.length), *(["--texts", given.texts] if given.texts else [])]
                subprocess.run(command, check=True)


def setting_of(given: argparse.Namespace, side: str, case: str | None) -> dict[str, Any]:
    """Return what a result is recorded under."""
    asked = {"model": Path(given.file).stem, "seq_len": given.length, "side": side}
    if case is None:
        return asked
    return asked | {"case": case, "remove": given.remove, "windows": given.windows, "texts": given.texts}


def known() -> list[dict[str, Any]]:
    """Return the settings measured so far."""
    file = RESULTS / f"{NAME}.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return [json.loads(line)["setting"] for line in lines]


def measure(given: argparse.Namespace, side: str, case: str | None) -> None:
    """Prune in one way, and read the result."""
    dense = secateur.open_model(given.file)
    before, found = parameters(dense.module), dict[str, Any]()
    module: Any = dense.module
    if case is not None:
        windows = windows_for(dense, given.texts, windows=given.windows, seq_len=given.length)
        begin, processor = time.perf_counter(), time.process_time()
        method = case if side == "plain" else OURS.get(case, case)
        if side == "plain":
            module = plain_methods.METHODS[case](dense.module, windows.tokens, given.remove)
        else:
            plan = secateur.make_plan(dense, method=method, texts=windows, remove=given.remove)
            module = secateur.prune(dense, plan, texts=windows).module
        found = {
            "method": method,
            "seconds": round(time.perf_counter() - begin, 1),
            "processor_s": round(time.process_time() - processor, 1),
            "peak_bytes": peak(),
            "removed": round(1 - parameters(module) / before, 4),
        }
    keep(NAME, setting_of(given, side, case), found | {"loss": losses(dense, module, given)})


def losses(dense: Decoder, module: Any, given: argparse.Namespace) -> dict[str, float]:
    """Return the mean next-token loss on each source, in nats."""
    texts = texts_that_judge(dense, str(given.wikitext), windows=JUDGED)
    return {name: round(plain_methods.mean_loss(module, windows.tokens), 5) for name, windows in texts.items()}


if __name__ == "__main__":
    main()
