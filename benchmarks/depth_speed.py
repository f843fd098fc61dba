"""How much of the speed-up that the removed share of block time promises `bench` finds on models with fewer blocks."""

from __future__ import annotations

from common import keep, random_llama

import secateur
from secateur.evaluation.speed import Timing
from secateur.evaluation.timing import Request, time_blocks
from secateur.models.decoder import Decoder

PHASES = {"prefill": Request(1, 128, 1), "decode": Request(1, 1, 32)}
"""Requests that are nothing but reading, and nearly nothing but writing."""


def promised(dense: Decoder, gone: int) -> dict[str, float]:
    """Whole time ÷ time without so many of the blocks, all alike, by the time measured in each."""
    found = {}
    for phase, request in PHASES.items():
        times = time_blocks(dense, request, kinds=[0] * dense.block_count, repeats=7)
        found[phase] = times.whole / (times.whole - gone * times.blocks[0])
    return found


def main(repeats: int = 11) -> None:
    """Take 3 and 6 of 12 blocks out of a random Llama in which blocks dominate."""
    dense = random_llama(width=768, blocks=12, vocabulary=1024)
    for gone in (3, 6):
        cut = secateur.prune(dense, secateur.make_plan(dense, method="last-n", blocks=gone))
        promise = promised(dense, gone)
        results = secateur.bench(
            cut, against=dense, timing=Timing(batch_sizes=[1], prompts=[128], new_tokens=32, repeats=repeats)
        )
        for phase, speedup in promise.items():
            (measured,) = [r for r in results if r.role == "model" and r.measure == f"{phase}_tokens_per_second"]
            assert measured.ratio is not None
            setting = {"width": 768, "blocks": 12, "gone": gone, "phase": phase, "rounds": repeats}
            found = {
                "promised": round(speedup, 3),
                "measured": round(measured.ratio, 3),
                "of_the_promise": round(measured.ratio / speedup, 3),
                "of_the_time_saved": round((1 - 1 / measured.ratio) / (1 - 1 / speedup), 3),
            }
            keep("depth_speed", setting, found)


if __name__ == "__main__":
    main()
