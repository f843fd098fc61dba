"""SLEB for 3 of 12 blocks, against running every candidate model in full."""

from __future__ import annotations

import torch
from common import compare, interleaved, keep, random_llama, random_windows

import secateur
from secateur.calibration.walk import batch_size_for
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.surgery.depth.blocks import keep_blocks


def greedy_in_full(model: Decoder, windows: Windows, count: int) -> tuple[int, ...]:
    """Run SLEB by building each candidate model and running all of it."""
    gone: tuple[int, ...] = ()
    for _ in range(count):
        losses = {}
        for block in set(range(1, model.block_count - 1)) - set(gone):
            kept = [one for one in range(model.block_count) if one not in (*gone, block)]
            losses[block] = full_loss(keep_blocks(model, kept), windows)
        gone = (*gone, min(losses, key=lambda one: (losses[one], one)))
    return tuple(sorted(gone))


@torch.no_grad()
def full_loss(model: Decoder, windows: Windows) -> float:
    """Mean next-token loss by the model's own forward."""
    total = 0.0
    for tokens, _ in windows.batches(batch_size_for(model, windows)):
        logits = model.module(input_ids=tokens, use_cache=False).logits[:, :-1]
        targets = tokens[:, 1:]
        total += float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"))
    return total / (len(windows) * (windows.seq_len - 1))


def main(windows: int = 4, length: int = 256, count: int = 3, rounds: int = 3) -> None:
    """Time both in turn, and make sure that they choose the same blocks."""
    model = random_llama()
    read = random_windows(windows, length)
    plan = secateur.make_plan(model, method="sleb", blocks=count, texts=read)
    assert plan.steps[0].blocks == greedy_in_full(model, read, count), "both must choose the same blocks"
    seconds = interleaved(
        {
            "sleb": lambda: secateur.make_plan(model, method="sleb", blocks=count, texts=read),
            "in_full": lambda: greedy_in_full(model, read, count),
        },
        rounds,
    )
    setting = {"windows": windows, "seq_len": length, "width": 768, "blocks": 12, "removed": count, "rounds": rounds}
    keep("sleb_speed", setting | {"chosen": plan.steps[0].blocks}, compare(seconds, "in_full", "sleb"))


if __name__ == "__main__":
    main()
