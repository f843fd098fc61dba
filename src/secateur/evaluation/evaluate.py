"""How good a model still is: perplexity on held-out text and tasks, dense and pruned in one run."""

from __future__ import annotations

from collections.abc import Sequence

from secateur.calibration.walk import mean_loss, perplexity_of
from secateur.data.texts import Texts, windows_for
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.reference import Reference
from secateur.evaluation.results import Result, result_of
from secateur.evaluation.tasks import ask_tasks, task_results
from secateur.models.decoder import Decoder
from secateur.progress import SILENT, Progress


def eval(
    model: Decoder,
    *,
    against: Decoder | Reference | None = None,
    texts: Texts = None,
    windows: int | None = 64,
    seq_len: int | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    stability: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> list[Result]:
    """Measure perplexity on held-out text, and tasks, of a model and of the one it is compared with, in one run.

    Args:
        model: the open model.
        against: the dense model to compare with, which must read the same tokens; or what it came to, measured before
            (`measure_reference`) on the same texts and questions.
        texts: see `secateur texts`; the held-out part is taken where a source has one. None is `python-stdlib`, or
            no text where tasks are named.
        windows: number of windows; None takes all the text there is.
        seq_len: tokens per window; None takes 512, or the models' positions if those are fewer.
        tasks: names such as `stdlib-cloze`, `commonsense` (the seven of the papers) or `piqa,arc_easy`, any of
            lm-evaluation-harness, and folders with tasks in its form. A skeleton is read into memory for them.
        limit: questions per task; None asks all.
        shots: examples shown before each question; None as each task says.
        stability: how much of what the dense model answers is answered the same way (METHODS §10), and how many
            answers change; needs `against`.
        seed: of the choice of examples.
        batch_size: windows or questions per batch; None chooses by the device.
        progress: shows how far it is.

    Returns:
        One result per number: perplexity of the model, then of the one it is compared with; then task by task.

    Raises:
        InputError: unusable texts, an unknown task or one without options for stability, data that cannot be had, or
            models with different vocabularies.
        NumericsError: NaN or infinity on the way; it never becomes a number.
    """
    dense = against if isinstance(against, Decoder) else None
    known = against if isinstance(against, Reference) else Reference()
    if dense is not None:
        require_same_vocabulary(model, dense)
    if stability and tasks is None:
        raise InputError("stability is measured on tasks; name some, such as stdlib-cloze.")
    if stability and against is None:
        raise InputError("stability compares two models; name the dense one (--against).")
    models = {"model": model} | ({"against": dense} if dense is not None else {})
    asked: list[Result] = []
    if tasks is not None:
        outcomes = ask_tasks(
            models,
            tasks,
            limit=limit,
            shots=shots,
            stability=stability,
            seed=seed,
            batch_size=batch_size,
            progress=progress,
        )
        before = (outcomes.get("against") or known.answers_to(outcomes["model"])) if stability else None
        asked = task_results(models, outcomes, limit=limit, stable_to=before)
        asked += known.results_on(outcomes["model"])
        if texts is None:
            return asked
    used = windows_for(model, texts, windows=windows, seq_len=seq_len, split="held-out")
    read = [measure_perplexity(one, role, used, batch_size, progress) for role, one in models.items()]
    return read + known.perplexity_on(used) + asked


def require_same_vocabulary(model: Decoder, against: Decoder) -> None:
    """Refuse two models that do not read the same tokens.

    Raises:
        InputError: naming both.
    """
    if model.tokenizer is None or against.tokenizer is None:
        return
    if model.tokenizer.get_vocab() != against.tokenizer.get_vocab():
        raise InputError(
            f"{model.source} and {against.source} have different vocabularies; their results cannot be compared."
        )


def measure_reference(
    model: Decoder,
    *,
    texts: Texts = None,
    windows: int | None = 64,
    seq_len: int | None = None,
    tasks: str | Sequence[str] | None = None,
    limit: int | None = None,
    shots: int | None = None,
    stability: bool = False,
    seed: int = 0,
    batch_size: int | None = None,
    progress: Progress = SILENT,
) -> Reference:
    """Measure the dense model once for many that are compared with it; arguments as for `eval`.

    Perplexity is always measured, tasks where some are named; with `stability` all of them must have options.

    Raises:
        InputError, NumericsError: as `eval`.
    """
    used = windows_for(model, texts, windows=windows, seq_len=seq_len, split="held-out")
    results = [measure_perplexity(model, "against", used, batch_size, progress)]
    if tasks is None:
        return Reference(tuple(results))
    models = {"against": model}
    outcomes = ask_tasks(
        models,
        tasks,
        limit=limit,
        shots=shots,
        stability=stability,
        seed=seed,
        batch_size=batch_size,
        progress=progress,
    )
    return Reference((*results, *task_results(models, outcomes, limit=limit)), tuple(outcomes["against"]))


def measure_perplexity(
    model: Decoder, role: str, windows: Windows, batch_size: int | None, progress: Progress
) -> Result:
    """Measure the perplexity of one model on windows, block by block for a skeleton.

    Raises:
        NumericsError: NaN or infinity on the way; it never becomes a perplexity.
    """
    loss = mean_loss(model, windows, batch_size=batch_size, progress=progress)
    return result_of(model, role, "perplexity", perplexity_of(loss), texts=windows.describe())
