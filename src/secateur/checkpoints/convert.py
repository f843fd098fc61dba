"""Write any model that can be opened as a safetensors checkpoint: from GGUF, from pickles, or in another dtype."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from secateur.checkpoints.save import save
from secateur.models.decoder import Decoder
from secateur.models.opening import open_model


def convert(
    model: Decoder | str | Path, out: str | Path, *, dtype: str | None = None, check: bool = True
) -> dict[str, Any]:
    """Save a model as a safetensors folder that plain transformers opens, verified in a fresh process.

    Args:
        model: an open model, or what `open_model` takes: a GGUF file, a folder, a name on the hub.
        out: the folder; one that secateur wrote before is replaced, any other is refused.
        dtype: dtype of the saved weights; None keeps the checkpoint's (of a GGUF what it was dequantised to).
        check: reopen the folder in a fresh process and compare logits and cached generation.

    Returns:
        The record that was written to `secateur.json`.

    Raises:
        InputError: the model or dtype does not exist, or the folder must not be replaced.
        ModelError: the model cannot be opened.
        NumericsError: a weight is NaN or infinite, or does not fit the dtype.
        CheckError: the reopened folder behaves differently; nothing is left at the target.
    """
    decoder = model if isinstance(model, Decoder) else open_model(model)
    return save(decoder, out, dtype=dtype, check=check)
