"""Whether a launcher (`accelerate launch`, `torchrun`) started several processes, as the environment tells."""

from __future__ import annotations

import os


def launched() -> int:
    """How many processes were started, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def leads() -> bool:
    """Whether this is the only process or the first of several: the one that speaks and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def number_here() -> int:
    """Give this process's number among those on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))
