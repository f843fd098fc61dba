"""Slice hidden directions two ways: a basis at every reading point, or one basis that keeps a stock model."""

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
    again = AutoModelForCausalLM.from_pretrained(folder)  # importing secateur made its shapes known
    result = secateur.evaluate(sliced, texts="python-stdlib", windows=8)[0]
    print(f"{method}: {' '.join(plan.steps[0].describe())}")
    print(f"  {type(again).__name__}, {plan.removed_fraction:.1%} smaller, held-out perplexity {result.value:.2f}")
