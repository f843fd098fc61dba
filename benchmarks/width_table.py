"""Held-out perplexity of the bundled model after width pruning, at equal fractions of its true parameters.

The fractions are those of 384, 320 and 256 of 512 channels. Names of methods on the command line restrict it to these.
"""

from __future__ import annotations

import sys
from typing import Any

from common import CODE, keep

import secateur
from secateur.data.texts import windows_for

AMOUNTS = (0.156, 0.235, 0.313)
CASES: list[tuple[str, dict[str, Any]]] = [
    ("wanda-sp", {"repair": False}),
    ("wanda-sp", {}),
    ("wanda-sp", {"heads": "even"}),
    ("minitron-width", {"repair": False}),
    ("minitron-width", {}),
    ("minitron-width", {"hidden": 0.125}),
    ("llm-pruner", {"repair": False}),
    ("llm-pruner", {}),
    ("llm-pruner", {"protect_first": 0, "protect_last": 0}),
    ("flap", {"repair": False, "bias": "off", "heads": "never"}),
    ("flap", {"repair": False, "heads": "never"}),
    ("flap", {"repair": False}),
    ("flap", {}),
    ("flap", {"heads": "never"}),
    ("obs-width", {"repair": False}),
    ("obs-width", {}),
]


def main(only: list[str], windows: int = 32) -> None:
    """Remove 16, 24 and 31 % of all parameters; calibration and held-out modules are disjoint."""
    model = secateur.open_model("bundled")
    calibration = windows_for(model, CODE, windows=windows)
    held_out = windows_for(model, CODE, windows=64, split="held-out")
    dense = secateur.evaluate(model, texts=held_out)[0].value
    for method, settings in [case for case in CASES if not only or case[0] in only]:
        for amount in AMOUNTS:
            setting = {"method": method, **settings, "remove": amount, "windows": windows}
            try:
                plan = secateur.make_plan(model, method=method, remove=amount, texts=calibration, settings=settings)
            except secateur.SecateurError as error:
                keep("width_table", setting, {"refused": str(error)})
                continue
            found = secateur.evaluate(secateur.prune(model, plan, texts=calibration), texts=held_out)[0].value
            keep(
                "width_table",
                setting,
                {
                    "removed": round(plan.removed_fraction, 4),
                    "keeps": plan.steps[-1].describe()[1],
                    "perplexity": round(found, 2),
                    "dense": round(dense, 2),
                },
            )


if __name__ == "__main__":
    main(sys.argv[1:])
