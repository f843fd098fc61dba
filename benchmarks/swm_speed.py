"""Sliding-window merging at one budget, against running a whole merged copy of the model for every candidate.

Arguments: windows, tokens of a window, blocks to take out, rounds; a single round is timed without a warm-up.
"""

from __future__ import annotations

import copy
import statistics
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import psutil
import torch
from common import compare, interleaved, keep, random_llama, random_windows
from torch import nn

import secateur
from secateur.calibration.walk import batch_size_for, start, step
from secateur.data.windows import Windows
from secateur.methods import merge_blocks
from secateur.methods.merge_blocks import Slide, find_threshold, slide
from secateur.models.decoder import Decoder
from secateur.plan.steps import MergeBlocks
from secateur.scores.merge_similarity import Merged, MergeProbe, window_cosines
from secateur.surgery.depth.merging import merged_tensors, shares_for

Run = Callable[[Decoder, Windows, int], Merged]


@torch.no_grad()
def whole_copy(model: Decoder, merged: Merged) -> nn.Module:
    """Return a copy of the whole model with these windows merged by the rule `top`."""
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

    def similarity(merged: Merged) -> float:
        if merged not in known:
            made = whole_copy(model, merged)
            found = [
                window_cosines(before, final_states(made, tokens), None)
                for before, tokens in zip(original, batches, strict=True)
            ]
            known[merged] = float(torch.cat(found).mean())
        return known[merged]

    def run(threshold: float) -> Slide:
        return slide(similarity, lambda _: True, range(model.block_count - 3, -1, -1), threshold)

    runs = find_threshold(run, known.values, count)
    fitting = [one.merged for one in runs if one.gone == count]
    best = max(fitting or [one for one in known if sum(h - low for low, h in one) == count], key=known.__getitem__)
    return tuple(sorted(best))


@torch.no_grad()
def seconds_of_a_block(model: Decoder, windows: Windows) -> float:
    """Median processor time of one block on all windows, over all blocks, states in memory."""
    batches = list(start(model, windows))
    states = [hidden for _, hidden in batches]
    times = []
    for index in range(model.block_count):
        before = time.process_time()
        states = [step(model, index, batch, hidden) for (batch, _), hidden in zip(batches, states, strict=True)]
        times.append(time.process_time() - before)
    return statistics.median(times)


def anonymous() -> int:
    """Bytes of anonymous memory of this process."""
    memory = psutil.Process().memory_info()
    return int(memory.rss - memory.shared)


def memory_of(run: Run, windows: int, length: int, count: int) -> tuple[int, int]:
    """Bytes of anonymous memory that the open model takes, and that model and run take at the peak of the run.

    The interpreter's own memory is not counted. Called in a process of its own; samples every two milliseconds.
    """
    own = anonymous()
    model, read = random_llama(), random_windows(windows, length)
    opened = anonymous() - own
    done, peak = threading.Event(), [0]

    def watch() -> None:
        while not done.wait(0.002):
            peak[0] = max(peak[0], anonymous() - own)

    watcher = threading.Thread(target=watch)
    watcher.start()
    run(model, read, count)
    done.set()
    watcher.join()
    return opened, peak[0]


def in_a_process(run: Run, *setting: int) -> tuple[int, int]:
    """Measure memory in a fresh process, so that what an earlier run left behind does not count."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(memory_of, run, *setting).result()


def merge_with_caches(model: Decoder, windows: Windows, count: int) -> Merged:
    """Make the search as the library does, all of it on all windows."""
    exact = {"screen": 1.0}
    (step,) = secateur.make_plan(model, method="swm", blocks=count, texts=windows, settings=exact).steps
    assert isinstance(step, MergeBlocks)
    return step.windows


def main(windows: int = 4, length: int = 256, count: int = 3, rounds: int = 2) -> None:
    """Time both in turn, make sure they choose the same windows, and account for every block evaluation."""
    probes: list[MergeProbe] = []

    class Counted(MergeProbe):
        def __init__(self, *given: object, **named: object) -> None:
            probes[:] = [self]
            super().__init__(*given, **named)  # type: ignore[arg-type]

    merge_blocks.MergeProbe = Counted  # type: ignore[misc]
    model, read = random_llama(), random_windows(windows, length)
    chosen: dict[str, Merged] = {}
    blocks: list[float] = []

    times = interleaved(
        {"swm": lambda: chosen.update(swm=merge_with_caches(model, read, count))}
        | {"blocks": lambda: blocks.append(seconds_of_a_block(model, read))}
        | {"in_full": lambda: chosen.update(in_full=merge_in_full(model, read, count))},
        rounds,
        warm=rounds > 1,
    )
    assert chosen["swm"] == chosen["in_full"], "both must choose the same windows"
    evaluations = probes[0].evaluated
    one = statistics.median(blocks[-rounds:])
    swm = statistics.median(processor for _, processor in times["swm"])
    opened, cached = in_a_process(merge_with_caches, windows, length, count)
    _, copied = in_a_process(merge_in_full, windows, length, count)
    keep(
        "swm_speed",
        {"windows": windows, "seq_len": length, "width": 768, "blocks": 12, "removed": count, "rounds": rounds}
        | {"chosen": chosen["swm"]},
        compare(times, "in_full", "swm")
        | {
            "candidates": len(probes[0].known),
            "block_evaluations": evaluations,
            "processor_seconds_per_block": round(one, 4),
            "processor_time_over_block_evaluations": round(swm / (evaluations * one), 3),
        }
        | {"model_mib": opened >> 20, "swm_peak_mib": cached >> 20, "in_full_peak_mib": copied >> 20}
        | {"memory_ratio": round(cached / copied, 3)}
        | {"memory_ratio_above_the_model": round((cached - opened) / (copied - opened), 3)},
    )


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
