"""What each rule of `swm` makes of the same windows of blocks, on a real model and three kinds of text.

    python benchmarks/merge_rules.py MODEL WIKITEXT.txt [SPANS …]     # such as 16-18,26-27

One line per rule and set of windows goes to `results/merge_rules.jsonl`: perplexity ÷ that of the dense model, on 4
windows of 512 tokens of each held-out source.
"""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import get_args

from common import keep, texts_that_judge

import secateur
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.models.decoder import Decoder
from secateur.plan.steps import Rule
from secateur.run_options import DEFAULTS
from secateur.scores.measure import score_model
from secateur.surgery.depth.merging import merge_windows

SPANS = ("26-27", "16-18,26-27", "13-14,16-18,25-27")


def main(model: str, wikitext: str, *spans: str) -> None:
    """Merge by every rule."""
    dense = secateur.open_model(model)
    texts = texts_that_judge(dense, wikitext, windows=4)

    def read(decoder: Decoder) -> dict[str, float]:
        return {name: perplexity(decoder, one, DEFAULTS) for name, one in texts.items()}

    before = read(dense)
    influence = score_model(dense, next(iter(texts.values()))).block_influence or ()
    for text in spans or SPANS:
        windows = [(int(low), int(high)) for low, high in (span.split("-") for span in text.split(","))]
        for rule in get_args(Rule):
            after = read(merge_windows(dense, windows, rule, influence))
            ratios = {source: round(after[source] / before[source], 4) for source in texts}
            mean = round(math.prod(ratios.values()) ** (1 / len(ratios)), 4)
            setting = {"model": Path(model).stem, "windows": text, "rule": rule}
            keep("merge_rules", setting, {"ratios": ratios, "geometric_mean": mean})


if __name__ == "__main__":
    main(*sys.argv[1:])
