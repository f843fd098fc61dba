"""Perplexity of a small trained mixture with fewer experts, on held-out code and manual prose.

    python benchmarks/train_mixture.py FOLDER
    python benchmarks/experts_table.py FOLDER [METHOD ...] [NUMBER ...]

Every method keeps 12, 8 or 14 of 16 experts in each block and is calibrated on 64 windows of both texts; `random` is
the mean over two draws. What remains is refitted unless a row says otherwise. Names and
numbers on the command line restrict it to these rows and numbers of experts.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
import warnings
from typing import Any

import torch
from common import keep

import secateur
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.plan.plan import Plan

SOURCES = ("python-stdlib", "python-docs")
LENGTH = 256
KEPT = (12, 8, 14)
DRAWS, HELD_OUT = 2, 32
TOKENS = 200_000

ROWS: dict[str, tuple[str, dict[str, Any]]] = {
    "reap": ("reap", {}),
    "ream": ("ream", {}),
    "expert-frequency": ("expert-frequency", {}),
    "expert-activation": ("expert-activation", {}),
    "random": ("random", {}),
    "reap repair=false": ("reap", {"repair": False}),
    "ream repair=false": ("ream", {"repair": False}),
    "expert-frequency repair=false": ("expert-frequency", {"repair": False}),
    "random repair=false": ("random", {"repair": False}),
    "ream align=false": ("ream", {"align": False}),
    "ream grouping=salient": ("ream", {"grouping": "salient"}),
    "ream average=frequency": ("ream", {"average": "frequency"}),
    "reap router": ("reap", {}),
    "ream router": ("ream", {}),
}
"""Label, method and settings; a label that ends in `router` is healed with that recipe."""


def at_random(model: Decoder, settings: dict[str, Any], seed: int, texts: Windows) -> Plan:
    """Return a plan that keeps experts drawn at random."""
    experts = settings["experts"]
    plan = secateur.make_plan(model, method="expert-frequency", texts=texts, settings=settings)
    step, draw = plan.steps[0], torch.Generator().manual_seed(seed)
    kept = tuple(tuple(sorted(torch.randperm(16, generator=draw)[:experts].tolist())) for _ in step.kept)
    return plan.model_copy(update={"steps": (step.model_copy(update={"kept": kept, "scores": ()}),)})


def perplexities(model: Decoder, held_out: dict[str, Windows]) -> list[float]:
    """Return the perplexity on each source."""
    return [secateur.evaluate(model, texts=windows)[0].value for windows in held_out.values()]


def main(folder: str, only: list[str]) -> None:
    """Cut and measure."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    model = secateur.open_model(folder)
    held_out = {s: windows_for(model, s, windows=HELD_OUT, seq_len=LENGTH, split="held-out") for s in SOURCES}
    texts = windows_for(model, ",".join(SOURCES), windows=64, seq_len=LENGTH)
    dense = perplexities(model, held_out)
    print("dense", dense)
    numbers, names = [int(one) for one in only if one.isdigit()], [one for one in only if not one.isdigit()]
    for experts in numbers or KEPT:
        for label in names or ROWS:
            method, settings = ROWS[label]
            given, found, begun = settings | {"experts": experts}, [], time.perf_counter()
            for seed in range(DRAWS if method == "random" else 1):
                if method == "random":
                    plan = at_random(model, given, seed, texts)
                else:
                    plan = secateur.make_plan(model, method=method, texts=texts, settings=given)
                pruned = secateur.prune(model, plan, texts=texts)
                if label.endswith("router"):
                    train = windows_for(model, ",".join(SOURCES), windows=TOKENS // LENGTH, seq_len=LENGTH)
                    pruned = secateur.heal(pruned, by="router", texts=train, settings={"learning_rate": 1e-3})
                found.append(perplexities(pruned, held_out))
            mean = [statistics.fmean(one) for one in zip(*found, strict=True)]
            ratios = [one / whole for one, whole in zip(mean, dense, strict=True)]
            chosen = model.config.num_experts_per_tok
            setting = {
                "method": label,
                "experts": experts,
                "of": 16,
                "chosen": chosen,
                "windows": 64,
                "seq_len": LENGTH,
            }
            keep(
                "experts_table",
                setting,
                {
                    **{source: round(value, 3) for source, value in zip(SOURCES, mean, strict=True)},
                    **{f"dense {source}": round(value, 3) for source, value in zip(SOURCES, dense, strict=True)},
                    "ratio": round(math.prod(ratios) ** (1 / len(ratios)), 4),
                    "removed": round(plan.removed_fraction, 4),
                    "seconds": round(time.perf_counter() - begun, 1),
                },
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
