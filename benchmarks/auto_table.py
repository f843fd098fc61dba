"""Held-out perplexity of the bundled model when `auto` splits the cut, beside the single methods of the same study.

Fractions on the command line restrict it to these; `fine` lets channels go in steps of 8, so that plans are closer in
size, and leaves out what did not come near the best.
"""

from __future__ import annotations

import sys
import time
from typing import Any

from common import CODE, keep

import secateur
from secateur.data.texts import windows_for

AMOUNTS = (0.2, 0.3, 0.4)
FINE = {"depth": "none,replaceme", "width": "none,obs-width", "obs-width.rounding": 8}


def main(amounts: list[float], settings: dict[str, Any], windows: int = 32) -> None:
    """Search at 20, 30 and 40 % of all parameters; calibration and held-out modules are disjoint."""
    model = secateur.open_model("bundled")
    calibration = windows_for(model, CODE, windows=windows)
    held_out = windows_for(model, CODE, windows=64, split="held-out")
    dense = secateur.evaluate(model, texts=held_out)[0].value
    for amount in amounts:
        wall, processor = time.perf_counter(), time.process_time()
        plan = secateur.make_plan(model, method="auto", remove=amount, texts=calibration, settings=settings)
        seconds = {"wall_s": time.perf_counter() - wall, "processor_s": time.process_time() - processor}
        assert plan.search is not None
        tried = [one for one in plan.search.candidates if one.enough and one.loss is not None]
        for name in [] if settings else single_methods(plan):
            own = {"network": "none"} if name == "streamline" else {}
            alone = secateur.make_plan(model, method=name, remove=amount, texts=calibration, settings=own)
            keep("auto_table", {"method": name, "remove": amount}, measured(model, alone, calibration, held_out, dense))
        keep(
            "auto_table",
            {"method": "auto", "remove": amount, "windows": windows, **settings},
            measured(model, plan, calibration, held_out, dense)
            | {"trials": len(tried), **{name: round(value, 1) for name, value in seconds.items()}}
            | {"tried": [one.model_dump(exclude_none=True) for one in plan.search.candidates]}
            | {"front": plan.search.front, "best": plan.search.best},
        )


def single_methods(plan: secateur.Plan) -> list[str]:
    """Name the methods that were tried by themselves."""
    assert plan.search is not None
    alone = [one for one in plan.search.candidates if one.enough and not (one.depth and one.width)]
    return [one.depth or one.width or "" for one in alone]


def measured(model: Any, plan: secateur.Plan, calibration: Any, held_out: Any, dense: float) -> dict[str, Any]:
    """Apply a plan and measure it on held-out text."""
    found = secateur.evaluate(secateur.prune(model, plan, texts=calibration), texts=held_out)[0].value
    return {
        "removed": round(plan.removed_fraction, 4),
        "does": [" ".join((step.method, *step.describe())) for step in plan.steps],
        "perplexity": round(found, 2),
        "dense": round(dense, 2),
    }


if __name__ == "__main__":
    given = sys.argv[1:]
    wanted = [float(one) for one in given if one != "fine"]
    main(wanted or list(AMOUNTS), FINE if "fine" in given else {})
