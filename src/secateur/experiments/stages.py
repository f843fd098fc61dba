"""The stages of a run: plan, prune, heal, eval, bench, generate. Each reads what the one before wrote.

Models are evaluated as saved and reopened. A stage is skipped if it was run before with the same settings and its
result is still there in case a later stage needs it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from secateur.checkpoints.save import save
from secateur.evaluation.reference import RESULTS
from secateur.evaluation.results import write_results
from secateur.evaluation.samples import write_samples
from secateur.experiments.recipe import Samples
from secateur.experiments.stages_run import Run
from secateur.experiments.state import CUT, PLAN, SAMPLES, SPEEDS
from secateur.files import replace_file
from secateur.healing.recipes import find_healing_recipe
from secateur.jobs.bench import bench
from secateur.jobs.evaluate import evaluate
from secateur.jobs.heal import heal
from secateur.jobs.plan import make_plan
from secateur.jobs.prune import prune
from secateur.models.decoder import Decoder
from secateur.plan.plan import Plan


def run_stages(run: Run, only: Collection[str] | None = None) -> Iterator[str]:
    """Run the pending stages; yield the name of each before it begins.

    Raises:
        SecateurError: a stage failed; this is recorded in the state.
    """
    run.forget_healing()
    run.reuse_sibling(only)
    if not run.pending():
        run.state.clear_failure()
    for stage in run.pending(only):
        yield stage
        run.begin(stage)
        begun = time.perf_counter()
        try:
            more = _DO[stage](run)
        except Exception as error:
            run.state.fail(stage, error)
            raise
        run.state.finish(stage, run.keys[stage], time.perf_counter() - begun, **more)
    run.close_dense()


def _plan(run: Run) -> dict[str, Any]:
    cut = run.recipe.prune
    plan = make_plan(
        run.open_dense(),
        method=cut.method,
        **cut.amount().fields(),
        **run.recipe.reading(),
        settings=cut.settings,
        scores=run.shared.scores,
        options=run.recipe.options(run.progress, run.work("training", "plan")),
    )
    replace_file(run.folder / PLAN, plan.to_json())
    return {"removed": plan.removed_fraction}


def _prune(run: Run) -> dict[str, Any]:
    work = run.work("training", "plan")
    pruned = prune(
        run.open_dense(),
        Plan.read(run.folder / PLAN),
        options=run.recipe.options(run.progress, work),
    )
    save(pruned, run.folder / CUT, check=run.recipe.check)
    shutil.rmtree(work, ignore_errors=True)
    return {"cut": CUT}


def _heal(run: Run) -> dict[str, Any]:
    asked = run.recipe.heal
    assert asked is not None, "the stage is only there where healing is asked for"
    recipe = find_healing_recipe(asked.with_)
    if not recipe.teacher:
        run.close_dense()
    work = run.work("healing", "heal")
    healed = heal(
        run.open(run.cut(), **({"skeleton": False} if recipe.whole and run.recipe.skeleton is None else {})),
        by=asked.with_,
        texts=asked.data(run.recipe),
        teacher=run.open_dense() if recipe.teacher else None,
        settings=asked.settings,
        options=run.recipe.options(run.progress, work),
    )
    save(healed, run.healed, check=run.recipe.check)
    shutil.rmtree(work, ignore_errors=True)
    return {"facts": healed.history[-1]["healing"]}


def _eval(run: Run) -> dict[str, Any]:
    against = run.against()
    results = evaluate(
        run.final(),
        against=against,
        **run.recipe.measuring(),
        options=run.recipe.options(run.progress),
    )
    own = [one for one in results if one.role == "model" or isinstance(against, Decoder)]
    write_results(run.folder / RESULTS, own)
    return {}


def _bench(run: Run) -> dict[str, Any]:
    asked = run.recipe.bench
    assert asked is not None, "the stage is only there where timing is asked for"
    results = bench(
        run.final(),
        against=run.open_dense(),
        timing=asked,
        options=run.recipe.options(run.progress),
    )
    write_results(run.folder / SPEEDS, results)
    return {}


def _generate(run: Run) -> dict[str, Any]:
    asked = run.recipe.generate
    assert asked is not None, "the stage is only there where samples are asked for"
    keep_samples(run.folder / SAMPLES, run.final(), run.recipe.measuring()["texts"], asked)
    return {}


_DO: dict[str, Callable[[Run], dict[str, Any]]] = {
    "plan": _plan,
    "prune": _prune,
    "heal": _heal,
    "eval": _eval,
    "bench": _bench,
    "generate": _generate,
}
"""The function of each stage, which returns additional facts for the state."""


def keep_samples(path: Path, model: Decoder, texts: str, asked: Samples) -> None:
    """Generate and save the samples a recipe asks for."""
    samples = write_samples(model, texts, prompts=asked.prompts, tokens=asked.tokens)
    replace_file(path, json.dumps([one.as_dict() for one in samples], indent=1, ensure_ascii=False) + "\n")
