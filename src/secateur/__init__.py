"""Secateur: structured pruning of large language models. Score, plan, prune, heal, evaluate, save.

import secateur

model = secateur.open_model("Qwen/Qwen3-0.6B")
scores = secateur.score(model)
plan = secateur.make_plan(model, method="obs-width", remove=0.2)
pruned = secateur.prune(model, plan)
secateur.save(pruned, "cut/")

Names are imported on first use, because importing torch and transformers takes seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.versions import __version__ as __version__

if TYPE_CHECKING:
    from secateur.checkpoints.push import CardFacts, push
    from secateur.checkpoints.save import convert, save
    from secateur.cli.demo import demo
    from secateur.errors import SecateurError
    from secateur.evaluation.speed import Timing
    from secateur.evaluation.tasks import TaskRequest
    from secateur.experiments.run import compare, run
    from secateur.experiments.study import Queue
    from secateur.export.gguf import GgufOptions, export_gguf
    from secateur.healing.data import TrainingTexts
    from secateur.jobs.bench import bench
    from secateur.jobs.evaluate import evaluate
    from secateur.jobs.heal import heal
    from secateur.jobs.plan import make_plan
    from secateur.jobs.prune import prune
    from secateur.jobs.score import score
    from secateur.models.inspection import inspect
    from secateur.models.opening import open_model
    from secateur.plan.amount import Amount
    from secateur.plan.plan import Plan
    from secateur.reporting.page import report
    from secateur.run_options import RunOptions
    from secateur.training.trainer import Tracking

__all__ = [
    "Amount",
    "CardFacts",
    "GgufOptions",
    "Plan",
    "Queue",
    "RunOptions",
    "SecateurError",
    "TaskRequest",
    "Timing",
    "Tracking",
    "TrainingTexts",
    "bench",
    "compare",
    "convert",
    "demo",
    "evaluate",
    "export_gguf",
    "heal",
    "inspect",
    "make_plan",
    "open_model",
    "prune",
    "push",
    "report",
    "run",
    "save",
    "score",
]

_WHERE = {
    "Amount": "plan.amount",
    "CardFacts": "checkpoints.push",
    "GgufOptions": "export.gguf",
    "Plan": "plan.plan",
    "Queue": "experiments.study",
    "RunOptions": "run_options",
    "SecateurError": "errors",
    "TaskRequest": "evaluation.tasks",
    "Timing": "evaluation.speed",
    "Tracking": "training.trainer",
    "TrainingTexts": "healing.data",
    "bench": "jobs.bench",
    "compare": "experiments.run",
    "convert": "checkpoints.save",
    "demo": "cli.demo",
    "evaluate": "jobs.evaluate",
    "export_gguf": "export.gguf",
    "heal": "jobs.heal",
    "inspect": "models.inspection",
    "make_plan": "jobs.plan",
    "open_model": "models.opening",
    "prune": "jobs.prune",
    "push": "checkpoints.push",
    "report": "reporting.page",
    "run": "experiments.run",
    "save": "checkpoints.save",
    "score": "jobs.score",
}
"""The module of each public name."""


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'secateur' has no attribute '{name}'")
    found = getattr(import_module(f"secateur.{_WHERE[name]}"), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
