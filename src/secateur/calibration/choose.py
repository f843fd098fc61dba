"""The windows a command works on, from what the user said and what the model can read."""

from __future__ import annotations

from pathlib import Path

from secateur.calibration.sources import STDLIB, Split
from secateur.calibration.texts import Bos, open_texts
from secateur.calibration.windows import Windows
from secateur.models.decoder import Decoder

Texts = str | Path | Windows | None
"""A source as in `secateur texts`, windows made before, or None for the default, `python-stdlib`."""

DEFAULT_SEQ_LEN = 512


def windows_for(
    model: Decoder,
    texts: Texts,
    *,
    windows: int | None,
    seq_len: int | None = None,
    seed: int = 0,
    split: Split = "calibration",
    pack: bool = True,
    bos: Bos = "auto",
) -> Windows:
    """Open texts for a model: its tokenizer, its vocabulary, its positions.

    Raises:
        InputError: an unknown source, too little text, or windows the model cannot read.
    """
    if isinstance(texts, Windows):
        return texts
    if seq_len is None:
        seq_len = min(DEFAULT_SEQ_LEN, model.max_positions or DEFAULT_SEQ_LEN)
    return open_texts(
        str(texts or STDLIB),
        model.tokenizer,
        windows=windows,
        seq_len=seq_len,
        seed=seed,
        split=split,
        pack=pack,
        bos=bos,
        vocab_size=model.module.get_input_embeddings().num_embeddings,
        max_positions=model.max_positions,
    )
