"""A skeleton of 1.2 billion parameters read from a cold disk: with the next block read ahead, and without.

    python benchmarks/cold_read.py [WINDOWS [LENGTH]]

The page cache is dropped before each walk, which takes root on Linux; walks are timed in turn.
"""

from __future__ import annotations

import sys
from pathlib import Path
from unittest import mock

import torch
from common import compare, interleaved, keep
from profile_methods import random_model

import secateur
from secateur.data.windows import Windows
from secateur.models.shards import Shards

SHAPE, VOCABULARY = "llama-1b", 128256


def dropped() -> None:
    """Drop the page cache."""
    Path("/proc/sys/vm/drop_caches").write_text("3", encoding="ascii")


def main(windows: int = 2, length: int = 256, rounds: int = 3) -> None:
    """Time both in turn."""
    model = random_model(SHAPE)
    read = Windows.of(torch.randint(0, VOCABULARY, (windows, length), generator=torch.Generator().manual_seed(0)))

    def ahead() -> None:
        dropped()
        secateur.score(model, texts=read)

    def on_demand() -> None:
        dropped()
        with mock.patch.object(Shards, "read_ahead"):
            secateur.score(model, texts=read)

    times = interleaved({"ahead": ahead, "on_demand": on_demand}, rounds)
    setting = {"model": SHAPE, "windows": windows, "seq_len": length, "rounds": rounds}
    keep("cold_read", setting, compare(times, "ahead", "on_demand"))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
