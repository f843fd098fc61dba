"""Several processes, as `accelerate launch` or `torchrun` start them."""

from __future__ import annotations

import os


def leads() -> bool:
    """Whether this is the only process or the first of several: the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0
