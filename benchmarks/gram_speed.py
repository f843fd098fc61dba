"""Gram matrices of one window of 512 tokens: float32 products added up in float64, against float64 throughout.

    python benchmarks/gram_speed.py [WIDTH …]

Processor seconds, in turn, and the largest difference relative to √(Gᵢᵢ Gⱼⱼ). Inputs are as uneven as in a transformer.
"""

from __future__ import annotations

import sys

import torch
from common import compare, interleaved, keep

from secateur.calibration.products import ROWS, add_upper, at_work, mirror_upper

WIDTHS = (576, 1536, 4096)
ROUNDS = 9


def main(widths: tuple[int, ...]) -> None:
    """Time both at each width, and compare what they give."""
    for width in widths:
        torch.manual_seed(0)
        inputs = torch.randn(ROWS, width) * torch.logspace(-2, 1, width)
        weight, home = torch.rand(ROWS), torch.device("cpu")
        exact, chunked = torch.zeros(2, width, width, dtype=torch.float64)

        def in_float64(inputs=inputs, weight=weight, into=exact) -> None:
            wide = inputs.double()
            into.addmm_((wide * weight[:, None].double()).T, wide)

        def in_float32(inputs=inputs, weight=weight, into=chunked, home=home) -> None:
            some = at_work(inputs, home)
            add_upper(into, some * weight[:, None], some)

        times = interleaved({"float32": in_float32, "float64": in_float64}, ROUNDS)
        mirror_upper(chunked)
        scale = exact.diagonal().sqrt()
        error = float(((chunked - exact).abs() / (scale[:, None] * scale)).max())
        keep(
            "gram_speed",
            {"width": width, "tokens": ROWS, "rounds": ROUNDS},
            compare(times, "float32", "float64") | {"error": error},
        )


if __name__ == "__main__":
    main(tuple(map(int, sys.argv[1:])) or WIDTHS)
