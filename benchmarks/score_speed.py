"""All one-pass scores (cosine, angular, magnitudes, both CKA) against plain forwards over the same windows."""

from __future__ import annotations

from typing import Any

import torch
from common import compare, interleaved, keep, random_llama, random_windows

import secateur
from secateur.calibration.walk import batch_size_for


def main(windows: int = 32, length: int = 512, rounds: int = 5) -> None:
    """Time both in turn; plain forwards use the batch size that scoring chooses."""
    model = random_llama()
    read = random_windows(windows, length)
    size = batch_size_for(model, read)

    @torch.no_grad()
    def plain_forwards() -> None:
        base: Any = model.module.model  # without the head, which scoring does not need either
        for tokens, _ in read.batches(size):
            base(input_ids=tokens, use_cache=False)

    seconds = interleaved({"scores": lambda: secateur.score(model, texts=read), "forwards": plain_forwards}, rounds)
    setting = {"windows": windows, "seq_len": length, "width": 768, "blocks": 12, "batch": size, "rounds": rounds}
    keep("score_speed", setting, compare(seconds, "scores", "forwards"))


if __name__ == "__main__":
    main()
