"""Held-out perplexity of the bundled model under every way of slicing, at equal fractions of its true parameters.

python benchmarks/slicing_table.py [METHOD …]
"""

from __future__ import annotations

import sys
from typing import Any

from common import CODE, keep

import secateur
from secateur.data.texts import windows_for
from secateur.errors import InputError

AMOUNTS = (0.10, 0.15, 0.20, 0.25, 0.30, 0.35)
SOME = (0.15, 0.25, 0.35)
CASES: list[tuple[str, dict[str, Any], tuple[float, ...]]] = [
    ("slicegpt", {}, AMOUNTS),
    ("dynamic-slicing", {}, AMOUNTS),
    ("stock-slicing", {}, AMOUNTS),
    ("stock-slicing", {"bases": 2}, AMOUNTS),
    ("slicegpt", {"signals": "normed"}, SOME),
    ("slicegpt", {"head": "sliced"}, SOME),
    ("dynamic-slicing", {"normalise": "interior"}, SOME[1:2]),
    ("dynamic-slicing", {"normalise": "rank"}, SOME[1:2]),
    ("stock-slicing", {"sensitivity": False}, SOME),
    ("stock-slicing", {"sensitivity": False, "reconstruct": False}, SOME),
    ("stock-slicing", {"signals": "raw"}, SOME),
    ("stock-slicing", {"bases": 4}, SOME[:2]),
    ("stock-slicing", {"bases": 12}, SOME[:2]),
]


def main(*methods: str, windows: int = 32) -> None:
    """Remove 10 to 35 % of all parameters, by all methods or some; calibration and held-out modules are disjoint."""
    model = secateur.open_model("bundled")
    calibration = windows_for(model, CODE, windows=windows)
    held_out = windows_for(model, CODE, windows=64, split="held-out")
    scores = secateur.score(model, texts=calibration, kinds=("cosine",))
    dense = secateur.evaluate(model, texts=held_out)[0].value
    for method, settings, amounts in CASES:
        for amount in amounts if not methods or method in methods else ():
            setting = {"method": method, **settings, "remove": amount, "windows": windows}
            try:
                plan = secateur.make_plan(
                    model, method=method, remove=amount, texts=calibration, settings=settings, scores=scores
                )
            except InputError as error:
                keep("slicing_table", setting, {"refused": str(error)})
                continue
            (step,) = plan.steps
            found = secateur.evaluate(secateur.prune(model, plan, texts=calibration), texts=held_out)[0].value
            keep(
                "slicing_table",
                setting,
                {
                    "removed": round(plan.removed_fraction, 4),
                    "widths": list(step.widths),
                    "slice_base": step.settings.get("slice_base"),
                    "perplexity": round(found, 2),
                    "dense": round(dense, 2),
                },
            )


if __name__ == "__main__":
    main(*sys.argv[1:])
