"""Blocks compiled by `torch.compile` against blocks as they are: seconds of a forward pass, and of compiling.

    python benchmarks/compiled_block.py MODEL [ROUNDS]

Two windows of 512 tokens; one compiled graph serves all blocks of a kind. It decides whether walks should compile.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

import torch
from common import LENGTH, compare, interleaved, keep

import secateur
from secateur.calibration.walk import start, step
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder


def main(model: str, rounds: int = 5) -> None:
    """Compile, then time both in turn."""
    plain, compiled = secateur.open_model(model), secateur.open_model(model)
    tokens = torch.randint(0, plain.config.vocab_size, (2, LENGTH), generator=torch.Generator().manual_seed(0))
    batch, hidden = next(start(plain, Windows.of(tokens)))

    @torch.no_grad()
    def forward(decoder: Decoder) -> torch.Tensor:
        states = hidden
        for index in range(decoder.block_count):
            states = step(decoder, index, batch, states)
        return states

    with torch._inductor.utils.fresh_cache():
        for block in compiled.block_list:
            block.compile(dynamic=False)
        begin = time.perf_counter()
        found = forward(compiled)
        compiling = time.perf_counter() - begin
        difference = float((found - forward(plain)).abs().max() / found.abs().max())
        runs = {"plain": lambda: forward(plain), "compiled": lambda: forward(compiled)}
        times = compare(interleaved(runs, rounds), "plain", "compiled")
    setting = {"model": Path(model).stem, "windows": len(tokens), "seq_len": LENGTH, "rounds": rounds}
    keep("compiled_block", setting, times | {"compiling_s": round(compiling, 1), "largest_difference": difference})


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
