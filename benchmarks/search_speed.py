"""Searches that compare many candidates, on a real model, against all candidates on all windows.

    python benchmarks/search_speed.py FILE.gguf TEXT.txt swm|sleb BLOCKS [WINDOWS LENGTH]

Processor seconds. `swm` is compared with the same search on all windows, and with that by thresholds halfway between
those seen; a candidate is measured once, and its seconds count for every search that asks for it. `sleb` is compared
with a full forward for every candidate of every round, each timed on a model with that many blocks and on the same
tokens, and with the blocks it removes where all candidates are measured each time.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from common import keep

import secateur
from secateur.calibration.walk import mean_loss
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.methods import merge_blocks
from secateur.methods.budget import Budget
from secateur.methods.method import Measurements, find_method
from secateur.models.decoder import Decoder
from secateur.scores.merge_similarity import Merged, MergeProbe
from secateur.surgery.depth.blocks import keep_blocks


class Timed(MergeProbe):
    """Notes the processor seconds of the pass over the original model, and of each candidate, by number of windows."""

    probes: ClassVar[list[Timed]] = []
    seconds: ClassVar[dict[tuple[int, Merged], float]] = {}

    def __init__(self, decoder: Decoder, windows: Windows, *given: Any) -> None:
        """Run the original model."""
        begin = time.process_time()
        super().__init__(decoder, windows, *given)
        self.seconds[len(windows), ()] = time.process_time() - begin
        self.windows = len(windows)
        self.probes.append(self)

    def _measure(self, merged: Merged) -> float:
        begin = time.process_time()
        found = super()._measure(merged)
        self.seconds[self.windows, merged] = time.process_time() - begin
        return found

    def asked(self) -> float:
        """Seconds of all that this probe was asked for."""
        return sum(self.seconds[self.windows, one] for one in ((), *self.known))


def swm(model: Decoder, windows: Windows, blocks: int) -> dict[str, Any]:
    """Make the search in three ways."""
    merge_blocks.MergeProbe = Timed  # type: ignore[misc]
    interpolated: Callable[[int, int, int], float] = merge_blocks._share
    method, measurements, found = find_method("swm"), Measurements(model, windows), dict[str, Any]()
    searches = {
        "screened": (method.settings().screen, interpolated),
        "all_windows": (1.0, interpolated),
        "all_windows_halving": (1.0, lambda *_: 0.5),
    }
    for name, (screen, share) in searches.items():
        merge_blocks._share, Timed.probes[:] = share, []
        settings = method.read_settings({"screen": screen})
        (step,) = method.decision(measurements, settings, Budget("blocks", blocks)).steps
        candidates = [len(one.known) for one in Timed.probes]
        seconds = round(sum(one.asked() for one in Timed.probes), 1)
        found[name] = {"processor_s": seconds, "candidates": candidates, "windows": step.windows}
        found[name]["similarity"] = round(step.similarity, 4)
    return found


def sleb(model: Decoder, windows: Windows, blocks: int) -> dict[str, Any]:
    """Remove blocks, as it is and measuring all candidates each time; time one candidate in full of each round."""
    seconds, removed = dict[str, float](), dict[str, list[int]]()
    for name, more in (("as_it_is", {}), ("each_time", {"again": 1})):
        begin = time.process_time()
        plan = secateur.make_plan(model, method="sleb", blocks=blocks, texts=windows, settings=more)
        seconds[name] = time.process_time() - begin
        removed[name] = sorted(set(range(model.block_count)) - set(plan.kept_blocks()))
    seconds["in_full"] = 0.0
    settings = find_method("sleb").settings()
    free, compared = settings.free_blocks(model.block_count), settings.compared_on(windows)
    for gone in range(1, blocks + 1):
        begin = time.process_time()
        mean_loss(keep_blocks(model, range(model.block_count - gone)), compared)
        seconds["in_full"] += (time.process_time() - begin) * (len(free) - gone + 1)
    return {f"{name}_processor_s": round(value, 1) for name, value in seconds.items()} | {
        "blocks": removed["as_it_is"],
        "same_blocks": removed["as_it_is"] == removed["each_time"],
        "tokens": compared.token_count,
        "processor_ratio": round(seconds["in_full"] / seconds["as_it_is"], 2),
    }


def main(file: str, text: str, method: str, blocks: int, windows: int = 16, length: int = 128) -> None:
    """Measure one method."""
    model = secateur.open_model(file)
    read = windows_for(model, text, windows=windows, seq_len=length)
    found = {"swm": swm, "sleb": sleb}[method](model, read, blocks)
    keep(
        "search_speed",
        {"model": Path(file).stem, "method": method, "removed": blocks, "windows": windows, "seq_len": length},
        found,
    )


if __name__ == "__main__":
    main(*sys.argv[1:4], *map(int, sys.argv[4:]))
