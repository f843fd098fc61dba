"""Sliding-window merging at one budget, against running a whole merged copy of the model for every candidate."""

from __future__ import annotations

import copy
import gc
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch
from common import compare, interleaved, keep, random_llama, random_windows
from torch import nn

import secateur
from secateur.calibration.stream import batch_size_for, start, step
from secateur.calibration.texts import Windows
from secateur.methods import merge_blocks
from secateur.methods.merge_blocks import Slide, find_threshold, slide
from secateur.models.decoder import Decoder
from secateur.scores.likeness import Merged, MergeProbe, window_cosines
from secateur.surgery.merging import merged_tensors, shares_for


@torch.no_grad()
def whole_copy(model: Decoder, merged: Merged) -> nn.Module:
    """Give a copy of the whole model with these windows merged by the rule `top`."""
    made = copy.deepcopy(model.module)
    gone: set[int] = set()
    for low, high in merged:
        tensors = merged_tensors(model, (low, high), shares_for("top", (low, high)))
        made.model.layers[low].load_state_dict(tensors)
        gone |= set(range(low + 1, high + 1))
    made.model.layers = nn.ModuleList(layer for index, layer in enumerate(made.model.layers) if index not in gone)
    made.config.num_hidden_layers = len(made.model.layers)
    return made


@torch.no_grad()
def final_states(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """What the head reads, by the model's own forward."""
    found: torch.Tensor = model.model(input_ids=tokens, use_cache=False).last_hidden_state
    return found


def merge_in_full(model: Decoder, windows: Windows, count: int) -> Merged:
    """Make the same search with a whole copied model for every candidate; each similarity is measured once too."""
    batches = [tokens for tokens, _ in windows.batches(batch_size_for(model, windows))]
    original = [final_states(model.module, tokens) for tokens in batches]
    known: dict[Merged, float] = {}

    def likeness(merged: Merged) -> float:
        if merged not in known:
            made = whole_copy(model, merged)
            found = [
                window_cosines(before, final_states(made, tokens), None)
                for before, tokens in zip(original, batches, strict=True)
            ]
            known[merged] = float(torch.cat(found).mean())
        return known[merged]

    def run(threshold: float) -> Slide:
        return slide(likeness, lambda _: True, range(model.block_count - 3, -1, -1), threshold)

    runs = find_threshold(run, known.values, count)
    fitting = [one.merged for one in runs if one.gone == count]
    best = max(fitting or [one for one in known if sum(h - low for low, h in one) == count], key=known.__getitem__)
    return tuple(sorted(best))


@torch.no_grad()
def seconds_of_a_block(model: Decoder, windows: Windows) -> float:
    """Median time of one block on all windows, over all blocks, states in memory."""
    batches = list(start(model, windows))
    states = [hidden for _, hidden in batches]
    times = []
    for index in range(model.block_count):
        before = time.perf_counter()
        states = [step(model, index, batch, hidden) for (batch, _), hidden in zip(batches, states, strict=True)]
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def peak_anonymous(run: Callable[[], object]) -> int:
    """Bytes of anonymous memory of this process at the peak of a run, sampled every five milliseconds."""
    process, done, peak = psutil.Process(), threading.Event(), [0]

    def watch() -> None:
        while not done.is_set():
            memory = process.memory_info()
            peak[0] = max(peak[0], memory.rss - memory.shared)
            time.sleep(0.005)

    gc.collect()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        run()
    finally:
        done.set()
        watcher.join()
    return peak[0]


def main(windows: int = 4, length: int = 256, count: int = 3, rounds: int = 2) -> None:
    """Time both in turn, make sure they choose the same windows, and account for every block evaluation."""
    probes: list[MergeProbe] = []

    class Counted(MergeProbe):
        def __init__(self, *given: object, **named: object) -> None:
            probes[:] = [self]
            super().__init__(*given, **named)  # type: ignore[arg-type]

    merge_blocks.MergeProbe = Counted  # type: ignore[misc]
    base = psutil.Process().memory_info()
    model, read = random_llama(), random_windows(windows, length)
    plan = secateur.make_plan(model, method="swm", blocks=count, texts=read)
    assert plan.steps[0].windows == merge_in_full(model, read, count), "both must choose the same windows"
    evaluations = probes[0].evaluated
    blocks: list[float] = []

    times = interleaved(
        {"swm": lambda: secateur.make_plan(model, method="swm", blocks=count, texts=read)}
        | {"blocks": lambda: blocks.append(seconds_of_a_block(model, read))}
        | {"in_full": lambda: merge_in_full(model, read, count)},
        rounds,
    )
    one = statistics.median(blocks[1:])
    swm = statistics.median(wall for wall, _ in times["swm"])
    own = base.rss - base.shared
    memory = {
        "swm_peak_mib": peak_anonymous(lambda: secateur.make_plan(model, method="swm", blocks=count, texts=read)) - own,
        "in_full_peak_mib": peak_anonymous(lambda: merge_in_full(model, read, count)) - own,
    }
    keep(
        "swm_speed",
        {"windows": windows, "seq_len": length, "width": 768, "blocks": 12, "removed": count, "rounds": rounds}
        | {"chosen": plan.steps[0].windows},
        compare(times, "in_full", "swm")
        | {
            "candidates": len(probes[0].known),
            "block_evaluations": evaluations,
            "seconds_per_block": round(one, 4),
            "time_over_block_evaluations": round(swm / (evaluations * one), 3),
        }
        | {name: round(value / 2**20) for name, value in memory.items()}
        | {"memory_ratio": round(memory["swm_peak_mib"] / memory["in_full_peak_mib"], 3)},
    )


if __name__ == "__main__":
    main()
