"""What an MLP refitted to the states of the dense model takes back of what is lost below it.

    python benchmarks/recovery.py MODEL [WINDOWS]

A third of the channels of every MLP goes, as `obs-width` takes them, on the default texts. At each block, what the
states lack is predicted from what enters the output projection of its narrow MLP, by the ridge regression that is best
on held-out windows; kept is the share of Σ ‖m‖² that it removes there. It is a part of why losses in low blocks count
less with `allocation=global` (`FADING`).
"""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any
from unittest import mock

from common import LENGTH, keep

import secateur
from secateur.calibration.ridge import GRID, held_out_gains, strength
from secateur.data.texts import windows_for
from secateur.models.widths import block_widths
from secateur.surgery.width import pruning

shares: dict[int, float] = {}


def refitted(decoder: Any, index: int, part: Any, sums: Any, *more: Any, **named: Any) -> Any:
    """Refit a projection, and note how much of what the states lack its inputs could predict."""
    found = _REFITTED(decoder, index, part, sums, *more, **named)
    fitted, held_out = sums[0].fitted, sums[0].held_out
    if fitted.cross is not None and float(held_out.lacking) > 0:
        stay = found.chosen[0][0].nonzero().flatten()
        gains = held_out_gains(
            fitted.gram[stay][:, stay],
            fitted.cross[stay],
            held_out.gram[stay][:, stay],
            held_out.cross[stay],
            [strength(fitted.gram, ridge) for ridge in GRID],
        )
        shares[index] = round(-min(gains) / float(held_out.lacking), 4)
    return found


_REFITTED = pruning.refitted


def main(name: str, windows: int = 32) -> None:
    """Measure every block but the first, below which nothing is lost."""
    model = secateur.open_model(name)
    read = windows_for(model, None, windows=windows, seq_len=LENGTH)
    kept = block_widths(model, 0).channels * 2 // 3
    plan = secateur.make_plan(model, method="obs-width", texts=read, settings={"ffn": kept})
    with mock.patch.object(pruning, "refitted", refitted):
        secateur.prune(model, plan, texts=read)
    keep(
        "recovery",
        {"model": Path(name).stem, "windows": windows, "kept": kept},
        {"shares": shares, "median": statistics.median(shares.values())},
    )


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
