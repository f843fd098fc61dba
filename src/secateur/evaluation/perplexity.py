"""Perplexity: exp of the mean next-token loss over non-overlapping windows (METHODS §10)."""

from __future__ import annotations

from secateur.calibration.choose import Texts, windows_for
from secateur.calibration.progress import SILENT, Progress
from secateur.calibration.stream import mean_loss, perplexity_of
from secateur.calibration.texts import Windows
from secateur.errors import InputError
from secateur.evaluation.results import Result
from secateur.models.decoder import Decoder
from secateur.versions import versions


def eval(
    model: Decoder,
    *,
    against: Decoder | None = None,
    texts: Texts = None,
    windows: int | None = 64,
    seq_len: int | None = None,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> list[Result]:
    """Measure perplexity on held-out text, of a model and of the one it is compared with, in one run.

    Args:
        model: the open model.
        against: the dense model to compare with; it must read the same tokens.
        texts: see `secateur texts`; the held-out part is taken where a source has one. None is `python-stdlib`.
        windows: number of windows; None takes all the text there is.
        seq_len: tokens per window; None takes 512, or the models' positions if those are fewer.
        batch_size: windows per batch; None chooses by the device.
        progress: shows how far it is.

    Returns:
        One result per model, the model first.

    Raises:
        InputError: unusable texts, or models with different vocabularies.
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    used = windows_for(model, texts, windows=windows, seq_len=seq_len, split="held-out")
    results = [_perplexity(model, "model", used, batch_size, progress)]
    if against is not None:
        _require_same_vocabulary(model, against)
        results.append(_perplexity(against, "against", used, batch_size, progress))
    return results


def _perplexity(model: Decoder, role: str, windows: Windows, batch_size: int | None, progress: Progress) -> Result:
    loss = mean_loss(model, windows, batch_size=batch_size, progress=progress)
    return Result(
        measure="perplexity",
        value=perplexity_of(loss),
        role=role,
        model=model.source,
        fingerprint=model.fingerprint,
        parameters=model.parameter_count,
        blocks=model.block_count,
        texts=windows.describe(),
        settings={"dtype": str(model.module.dtype).removeprefix("torch."), "device": str(model.device)},
        versions=versions(),
    )


def _require_same_vocabulary(model: Decoder, against: Decoder) -> None:
    if model.tokenizer is None or against.tokenizer is None:
        return
    if model.tokenizer.get_vocab() != against.tokenizer.get_vocab():
        raise InputError(
            f"{model.source} and {against.source} have different vocabularies; their perplexities cannot be compared."
        )
