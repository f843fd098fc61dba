"""What each method that takes out blocks does to the bundled model: held-out perplexity, before and after healing.

Every result is healed with the same budget: all weights, the same windows, the same seed. Names of methods on the
command line restrict it to these.
"""

from __future__ import annotations

import sys
from typing import Any

from common import CODE, keep

import secateur
from secateur.data.texts import windows_for

CASES: list[tuple[str, dict[str, Any]]] = [
    ("shortgpt", {}),
    ("uidl", {}),
    ("sleb", {}),
    ("shortened-llama", {"criterion": "ppl"}),
    ("shortened-llama", {"criterion": "taylor"}),
    ("shortened-llama", {"criterion": "magnitude"}),
    ("last-n", {}),
    ("swm", {"rule": "highest"}),
    ("swm", {"rule": "top"}),
    ("swm", {"rule": "delta-sum"}),
    ("swm", {"rule": "mean"}),
    ("swm", {"rule": "weighted"}),
    ("replaceme", {}),
    ("replaceme", {"choose": "error"}),
    ("streamline", {"network": "none"}),
    ("streamline", {"network": "block", "loss": "mse", "train_tokens": 300_000}),
    ("streamline", {"network": "block", "loss": "lm", "train_tokens": 300_000}),
]
HEALING = {"by": "full", "tokens": 50_000}


def main(only: list[str], windows: int = 32, amounts: tuple[int, ...] = (2, 3, 4)) -> None:
    """Take out 2, 3 and 4 of 12 blocks (14, 22 and 29 %) by every method; held-out modules are in no other text.

    Methods that drop the same blocks leave the same model, which is healed once.
    """
    model = secateur.open_model("bundled")
    calibration = windows_for(model, CODE, windows=windows)
    held_out = windows_for(model, CODE, windows=64, split="held-out")
    scores = secateur.score(model, texts=calibration, kinds=("cosine", "angular", "magnitude", "perplexity", "taylor"))
    dense = secateur.evaluate(model, texts=held_out)[0].value
    seen: dict[tuple[int, ...], tuple[float, float]] = {}
    for method, settings in [case for case in CASES if not only or case[0] in only]:
        for count in amounts:
            plan = secateur.make_plan(
                model, method=method, blocks=count, texts=calibration, settings=settings, scores=scores
            )
            kept = tuple(plan.kept_blocks())
            only_drops = all(step.kind == "drop-blocks" for step in plan.steps)
            if not only_drops or kept not in seen:
                pruned = secateur.prune(model, plan, texts=calibration)
                healed = secateur.heal(pruned, **HEALING)
                before, after = (secateur.evaluate(one, texts=held_out)[0].value for one in (pruned, healed))
                if only_drops:
                    seen[kept] = before, after
            else:
                before, after = seen[kept]
            keep(
                "methods_table",
                {"method": method, **settings, "blocks": count, "windows": windows, "healing": HEALING},
                {
                    "removed": round(plan.removed_fraction, 4),
                    "gone": sorted(set(range(model.block_count)) - set(kept)),
                    "perplexity": round(before, 2),
                    "healed": round(after, 2),
                    "dense": round(dense, 2),
                },
            )


if __name__ == "__main__":
    main(sys.argv[1:])
