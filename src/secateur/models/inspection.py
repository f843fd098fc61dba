"""What `secateur.inspect` reports about a model."""

from __future__ import annotations

from typing import Any

from secateur.models.decoder import Decoder


def inspect(model: Decoder) -> dict[str, Any]:
    """Return family, shape, sizes and dtypes of an open model; a skeleton suffices.

    Returns:
        Names and values in reading order; sizes are numbers of parameters, tied tensors counted once.
    """
    sizes = model.block_parameter_counts()
    even = len(set(sizes)) == 1
    return {
        **model.anatomy.describe(),
        "hidden size": model.hidden_size,
        "positions": model.max_positions or "no limit",
        "parameters": f"{model.parameter_count:,}",
        "per block": f"{sizes[0]:,}" if even else f"{min(sizes):,} to {max(sizes):,}",
        "one block is": f"{max(sizes) / model.parameter_count:.1%} of all parameters",
        "outside the blocks": f"{model.parameter_count - sum(sizes):,}",
        "stored as": str(model.saved_dtype).removeprefix("torch."),
        "tokenizer": "none" if model.tokenizer is None else f"{len(model.tokenizer):,} entries",
        "fingerprint": model.fingerprint[:16] or "not known: the weights are not here",
    }
