"""The demo: score, plan, prune, check and evaluate the small trained model that ships with the package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import rich
from rich.panel import Panel

from secateur.checkpoints.folders import replacing
from secateur.checkpoints.save import save
from secateur.cli.tables import plan_summary, results_table, scores_table
from secateur.data.interpreter import STDLIB
from secateur.data.texts import windows_for
from secateur.evaluation.results import append_results
from secateur.jobs.evaluate import evaluate
from secateur.jobs.plan import make_plan
from secateur.jobs.prune import prune
from secateur.jobs.runs import run_folder, write_marker
from secateur.jobs.score import score
from secateur.models.decoder import Decoder
from secateur.models.fetch import BUNDLED
from secateur.models.opening import open_model
from secateur.progress import SILENT, Progress
from secateur.reporting.pictures import draw_scores
from secateur.run_options import RunOptions

PROMPT = '''class Stack:
    """A last-in, first-out collection."""

    def __init__(self):
        self.items = []

    def push(self, item):'''


def demo(
    out: str | Path | None = None, *, show: Callable[[Any], object] = rich.print, progress: Progress = SILENT
) -> Path:
    """Score, plan (replaceme, 25 %), prune, check and evaluate the bundled model on Python's standard library.

    Args:
        out: output folder; None creates one under `secateur-runs/`.
        show: called with everything to display.
        progress: reports progress.

    Returns:
        The folder, with `scores.json`, plots, `plan.json`, the pruned checkpoint `cut/` and `results.jsonl`.
    """
    folder = Path(out) if out is not None else run_folder(BUNDLED, "demo")
    with replacing(folder) as part:
        model = open_model(BUNDLED)
        show(f"1. Open: a trained Llama with {model.block_count} blocks and {model.parameter_count:,} parameters.")
        windows = windows_for(model, STDLIB, windows=32)
        show(f"2. Score: {len(windows)} windows of {windows.seq_len} tokens of Python's standard library.")
        scores = score(model, texts=windows, options=RunOptions(progress=progress))
        scores.write(part / "scores.json")
        draw_scores(scores, part)
        show(scores_table(scores))
        show("3. Plan: remove about 25 % of all parameters, replacing blocks by a matrix; nothing is trained.")
        plan = make_plan(
            model, method="replaceme", remove=0.25, texts=windows, scores=scores, options=RunOptions(progress=progress)
        )
        plan.write(part / "plan.json")
        show(plan_summary(plan))
        show("4. Prune: remove, save, and reopen in a fresh process without secateur.")
        pruned = prune(model, plan, options=RunOptions(progress=progress))
        record = save(pruned, part / "cut")
        show(f"   {record['check']['architecture']} with {record['blocks']} blocks: same logits, same generation.")
        show("5. Evaluate on modules used neither for training nor for calibration.")
        results = evaluate(pruned, against=model, texts=STDLIB, windows=64, options=RunOptions(progress=progress))
        append_results(part / "results.jsonl", results)
        show(results_table(results))
        for name, one in {"dense": model, "pruned": pruned}.items():
            show(Panel(_continuation(one), title=f"{name}: a piece of Python, continued", title_align="left"))
        write_marker(part, "demo", {"model": BUNDLED, "texts": windows.describe()})
    show(_farewell(folder))
    return folder


def _continuation(model: Decoder) -> str:
    assert model.tokenizer is not None
    encoded = model.tokenizer(PROMPT, return_tensors="pt").to(model.device)
    written = model.module.generate(**encoded, max_new_tokens=48, do_sample=False, repetition_penalty=1.15)
    return str(model.tokenizer.decode(written[0], skip_special_tokens=True))


def _farewell(folder: Path) -> str:
    return f"""
Everything is in {folder}: scores.json and plots, plan.json, the pruned checkpoint cut/, results.jsonl.
Pruning costs quality; training recovers some of it (`secateur heal`). The first choice is what to remove, and how much:
see `secateur methods`.

For your own model (a folder, or a name on the Hub):
  secateur score MODEL
  secateur plan  MODEL --method replaceme --remove 25% -o plan.json
  secateur prune MODEL --plan plan.json -o cut/
  secateur eval  cut/ --against MODEL
"""
