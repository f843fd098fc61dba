"""Slice hidden directions in two ways: with one basis per reading point, or with a single basis and a stock result."""

import tempfile
from pathlib import Path

from transformers import AutoModelForCausalLM

import secateur

model = secateur.open_model("bundled")
for method in ("slicegpt", "stock-slicing"):
    plan = secateur.make_plan(model, method=method, remove=0.15, texts="python-stdlib", windows=8)
    sliced = secateur.prune(model, plan)
    folder = Path(tempfile.mkdtemp(), method)
    secateur.save(sliced, folder)
    again = AutoModelForCausalLM.from_pretrained(folder)  # importing secateur registers its classes
    result = secateur.evaluate(sliced, texts="python-stdlib", windows=8)[0]
    print(f"{method}: {' '.join(plan.steps[0].describe())}")
    print(f"  {type(again).__name__}, {plan.removed_fraction:.1%} smaller, held-out perplexity {result.value:.2f}")
