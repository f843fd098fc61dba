"""What each method does to the bundled model: held-out perplexity against parameters removed, no healing.

Names of methods on the command line restrict it to these.
"""

from __future__ import annotations

import sys
from typing import Any

from common import keep

import secateur
from secateur.calibration.choose import windows_for

CASES: list[tuple[str, dict[str, Any]]] = [
    ("shortgpt", {}),
    ("uidl", {}),
    ("streamline", {"network": "none"}),
    ("streamline", {"network": "block", "train_tokens": 1_000_000}),
    ("last-n", {}),
    ("shortened-llama", {"criterion": "ppl"}),
    ("shortened-llama", {"criterion": "taylor"}),
    ("shortened-llama", {"criterion": "magnitude"}),
    ("sleb", {}),
    ("swm", {"rule": "top"}),
    ("swm", {"rule": "delta-sum"}),
    ("replaceme", {}),
    ("replaceme", {"max_window": 4}),
]


def main(only: list[str], windows: int = 32, amounts: tuple[int, ...] = (1, 2, 3, 4)) -> None:
    """Take out 1 to 4 of 12 blocks by every method; calibration and held-out modules are disjoint."""
    model = secateur.open_model("bundled")
    calibration = windows_for(model, None, windows=windows)
    held_out = windows_for(model, None, windows=64, split="held-out")
    scores = secateur.score(model, texts=calibration, kinds=("cosine", "angular", "magnitude", "perplexity", "taylor"))
    dense = secateur.eval(model, texts=held_out)[0].value
    for method, settings in [case for case in CASES if not only or case[0] in only]:
        for count in amounts:
            plan = secateur.make_plan(
                model, method=method, blocks=count, texts=calibration, settings=settings, scores=scores
            )
            pruned = secateur.prune(model, plan, texts=calibration)
            found = secateur.eval(pruned, texts=held_out)[0].value
            gone = sorted(set(range(model.block_count)) - set(plan.kept_blocks()))
            keep(
                "methods_table",
                {"method": method, **settings, "blocks": count, "windows": windows},
                {
                    "removed": round(plan.removed_fraction, 4),
                    "gone": gone,
                    "perplexity": round(found, 2),
                    "dense": round(dense, 2),
                },
            )


if __name__ == "__main__":
    main(sys.argv[1:])
