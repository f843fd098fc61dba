"""Secateur: structured pruning of large language models. Score, plan, cut, check, save.

import secateur

model = secateur.open_model("Qwen/Qwen3-0.6B")
scores = secateur.score(model, texts="wikitext2")
plan = secateur.make_plan(model, method="streamline", remove=0.25, texts="wikitext2")
pruned = secateur.prune(model, plan)
secateur.save(pruned, "cut/")
"""

__version__ = "0.1.0"

from secateur.checkpoints.push import push
from secateur.checkpoints.save import save
from secateur.comparing.run import compare, run
from secateur.demonstration import demo
from secateur.errors import SecateurError
from secateur.evaluation.evaluate import eval
from secateur.evaluation.speed import bench
from secateur.healing.heal import heal
from secateur.methods.planning import make_plan, prune
from secateur.models.inspection import inspect
from secateur.models.open import open_model
from secateur.plan import Plan
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
