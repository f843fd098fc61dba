"""Secateur: structured pruning of large language models. Score, plan, cut, heal, prove, save.

import secateur

model = secateur.open_model("Qwen/Qwen3-0.6B")
scores = secateur.score(model, texts="wikitext2")
plan = secateur.make_plan(model, method="streamline", remove=0.25, texts="wikitext2")
pruned = secateur.prune(model, plan)
secateur.save(pruned, "cut/")

Names are imported when they are first used: torch and transformers take seconds.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from secateur.versions import __version__ as __version__

if TYPE_CHECKING:
    from secateur.checkpoints.push import push
    from secateur.checkpoints.save import save
    from secateur.cli.demo import demo
    from secateur.errors import SecateurError
    from secateur.evaluation.evaluate import eval
    from secateur.evaluation.speed import bench
    from secateur.experiments.run import compare, run
    from secateur.healing.heal import heal
    from secateur.methods.planning import make_plan, prune
    from secateur.models.inspection import inspect
    from secateur.models.opening import open_model
    from secateur.plan.plan import Plan
    from secateur.reporting.page import report
    from secateur.scores.measure import score

__all__ = [
    "Plan",
    "SecateurError",
    "bench",
    "compare",
    "demo",
    "eval",
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
    "Plan": "plan.plan",
    "SecateurError": "errors",
    "bench": "evaluation.speed",
    "compare": "experiments.run",
    "demo": "cli.demo",
    "eval": "evaluation.evaluate",
    "heal": "healing.heal",
    "inspect": "models.inspection",
    "make_plan": "methods.planning",
    "open_model": "models.opening",
    "prune": "methods.planning",
    "push": "checkpoints.push",
    "report": "reporting.page",
    "run": "experiments.run",
    "save": "checkpoints.save",
    "score": "scores.measure",
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
