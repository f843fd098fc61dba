"""What each way of healing brings back to the bundled model, against the tokens it has seen.

25 % of the parameters go, by `streamline` and by `slicegpt`; then each recipe learns from the same windows of the
standard library with the same seed, and held-out perplexity is measured on other modules. The dense model is given the
same training, so that learning new text is not mistaken for healing. Arguments restrict it: method names,
recipe names and numbers of tokens. `--draw` makes the picture of what is kept.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import matplotlib.pyplot as plt
from common import CODE, RESULTS, keep

import secateur
from secateur.data.texts import windows_for
from secateur.healing.recipes import HEALING_RECIPES

CUTS = {"streamline": {"train_tokens": "300k"}, "slicegpt": {}, "dense": {}}
TOKENS = (100_000, 300_000, 1_000_000)
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "healing.png"


def main(words: list[str]) -> None:
    """Heal and measure; what a model has no use for is left out: the dense one needs no teacher."""
    cuts = [name for name in CUTS if name in words] or list(CUTS)
    rungs = [name for name in HEALING_RECIPES if name in words] or [
        name for name in HEALING_RECIPES if name != "router"
    ]
    amounts = [int(word) for word in words if word.isdecimal()] or list(TOKENS)
    model = secateur.open_model("bundled")
    held_out = windows_for(model, CODE, windows=64, split="held-out")
    dense = secateur.evaluate(model, texts=held_out)[0].value
    for name in cuts:
        pruned, removed = model, 0.0
        if name != "dense":
            plan = secateur.make_plan(model, method=name, remove=0.25, texts=CODE, settings=CUTS[name])
            pruned, removed = secateur.prune(model, plan), plan.removed_fraction
        before = secateur.evaluate(pruned, texts=held_out)[0].value
        for tokens in amounts:
            for recipe in rungs:
                if HEALING_RECIPES[recipe].teacher and (name == "dense" or (recipe == "blocks" and name == "slicegpt")):
                    continue
                begun = time.perf_counter()
                healed = secateur.heal(
                    pruned,
                    by=recipe,
                    texts=CODE,
                    tokens=tokens,
                    teacher=model if HEALING_RECIPES[recipe].teacher else None,
                )
                seconds = time.perf_counter() - begun
                after = secateur.evaluate(healed, texts=held_out)[0].value
                keep(
                    "healing_table",
                    {
                        "cut": name,
                        **CUTS[name],
                        "removed": round(removed, 4),
                        "recipe": recipe,
                        "tokens": tokens,
                    },
                    {
                        "dense": round(dense, 2),
                        "before": round(before, 2),
                        "perplexity": round(after, 2),
                        "seconds": round(seconds),
                    },
                )


def draw() -> None:
    """Draw perplexity against tokens for every cut, the newest measurement of each point."""
    points: dict[tuple[str, str], dict[int, dict]] = {}
    for line in (RESULTS / "healing_table.jsonl").read_text().splitlines():
        found = json.loads(line)
        case, result = found["setting"], found["found"]
        points.setdefault((case["cut"], case["recipe"]), {})[case["tokens"]] = result
    cuts = [name for name in CUTS if any(cut == name for cut, _ in points)]
    figure, axes = plt.subplots(1, len(cuts), figsize=(4.2 * len(cuts), 3.6), squeeze=False)
    lines = {}
    for axis, cut in zip(axes[0], cuts, strict=True):
        for (name, recipe), found in points.items():
            if name == cut:
                first = next(iter(found.values()))
                tokens = sorted(found)
                measured = [first["before"], *(found[count]["perplexity"] for count in tokens)]
                (lines[recipe],) = axis.plot(
                    [0, *tokens], measured, "o-", color=f"C{list(HEALING_RECIPES).index(recipe)}"
                )
                axis.axhline(first["dense"], color="grey", linewidth=0.8, linestyle="--")
        counts = sorted({count for (name, _), found in points.items() if name == cut for count in found})
        axis.set_xticks([0, *counts], ["0", *(f"{count // 1000}k" for count in counts)])
        axis.set_title(cut if cut == "dense" else f"25 % by {cut}")
        axis.set_xlabel("tokens seen")
        axis.set_ylabel("held-out perplexity")
    shown = [recipe for recipe in HEALING_RECIPES if recipe in lines]
    figure.tight_layout(rect=(0, 0, 0.91, 1))
    figure.legend([lines[recipe] for recipe in shown], shown, loc="center right")
    figure.savefig(PICTURE, dpi=120)


if __name__ == "__main__":
    if sys.argv[1:] == ["--draw"]:
        draw()
    else:
        main(sys.argv[1:])
