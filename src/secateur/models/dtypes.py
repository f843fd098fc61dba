"""The dtypes that weights are held, computed with and saved in, by their names."""

from __future__ import annotations

import torch

from secateur.errors import unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str, *also: str) -> torch.dtype:
    """Return a dtype by its name; `also` are other words that stand in its place, for the message.

    Raises:
        InputError: an unknown one.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, [*also, *DTYPES])
    return DTYPES[name]
