"""The dtypes of weights and arithmetic, by name."""

from __future__ import annotations

import torch

from secateur.errors import unknown

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str, *also: str) -> torch.dtype:
    """Return a dtype by its name; `also` lists other accepted words, for the error message.

    Raises:
        InputError: an unknown dtype.
    """
    if name not in DTYPES:
        raise unknown("dtype", name, [*also, *DTYPES])
    return DTYPES[name]
