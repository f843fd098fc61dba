"""Widths for every block against the same for all, branches against blocks, on a real model and three kinds of text.

    python benchmarks/allocation.py MODEL WIKITEXT.txt [CASE@SHARE …]     # such as uniform@0.2 global@0.2

Calibrated on 32 windows of the default mixture, which WikiText is no part of, or on as many as a command takes by
default (`global, 96 windows@0.5`); judged on 8 windows of 512 tokens of each held-out source. One line per case goes to
`results/allocation.jsonl`.
"""

from __future__ import annotations

import math
import re
import sys
import time
import warnings
from typing import Any
from unittest import mock

from common import LENGTH, keep, texts_that_judge
from transformers.utils import logging

import secateur
from secateur.data.texts import windows_for
from secateur.errors import SecateurWarning
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.methods.allocation import widths
from secateur.models.decoder import Decoder
from secateur.plan.units import summary
from secateur.run_options import DEFAULTS

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "uniform": ("obs-width", {}),
    "global": ("obs-width", {"allocation": "global"}),
    "global, fading=0": ("obs-width", {"allocation": "global"}),
    "global, align=false": ("obs-width", {"allocation": "global", "align": False}),
    "global, align=true": ("obs-width", {"allocation": "global", "align": True}),
    "uniform, align=false": ("obs-width", {"align": False}),
    "uniform, align=true": ("obs-width", {"align": True}),
    "global, attention=groups": ("obs-width", {"allocation": "global", "attention": "groups"}),
    "global, attention=groups, refine=2": ("obs-width", {"allocation": "global", "attention": "groups", "refine": 2}),
    "global, refine=2": ("obs-width", {"allocation": "global", "refine": 2}),
    "branches": ("branches", {}),
    "branches-without-repair": ("branches", {"repair": False}),
    "shortgpt": ("shortgpt", {}),
    "sleb": ("sleb", {}),
    "replaceme": ("replaceme", {}),
    "2ssp": ("2ssp", {}),
}
DEFAULT = ("uniform@0.2", "global@0.2", "uniform@0.3", "global@0.3", "branches@0.15", "shortgpt@0.15")


def read_case(name: str) -> tuple[str, int]:
    """Split a case into what is done, and the number of windows to calibrate on."""
    found = re.fullmatch(r"(.+), (\d+) windows", name)
    return (found[1], int(found[2])) if found else (name, 32)


def main(model: str, wikitext: str, *cases: str) -> None:
    """Measure the cases."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", SecateurWarning)
    dense = secateur.open_model(model)
    texts = texts_that_judge(dense, wikitext)

    def read(decoder: Decoder) -> dict[str, float]:
        return {name: perplexity(decoder, one, DEFAULTS) for name, one in texts.items()}

    before = read(dense)
    for case in cases or DEFAULT:
        name, _, amount = case.partition("@")
        done, count = read_case(name)
        method, settings = CASES[done]
        windows = windows_for(dense, None, windows=count, seq_len=LENGTH)
        started = time.perf_counter()
        fading = 0.0 if name.endswith("fading=0") else widths.FADING
        with mock.patch.object(widths, "FADING", fading):
            plan = secateur.make_plan(dense, method=method, texts=windows, settings=settings, remove=float(amount))
        planned = time.perf_counter()
        pruned = secateur.prune(dense, plan, texts=windows)
        done = time.perf_counter()
        after = read(pruned)
        ratios = {source: after[source] / before[source] for source in texts}
        keep(
            "allocation",
            {"case": name, "remove": float(amount), "model": "SmolLM2-135M-Instruct", "windows": len(windows)},
            {
                "removed": round(1 - pruned.parameter_count / dense.parameter_count, 4),
                "dense": {source: round(value, 3) for source, value in before.items()},
                "ratios": {source: round(value, 4) for source, value in ratios.items()},
                "geometric_mean": round(math.prod(ratios.values()) ** (1 / len(ratios)), 4),
                "plan_seconds": round(planned - started, 1),
                "apply_seconds": round(done - planned, 1),
                "removes": summary(plan.removes()),
            },
        )


if __name__ == "__main__":
    main(*sys.argv[1:])
