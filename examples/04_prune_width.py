"""Prune the width of every MLP, with and without closed-form repair; the result is a stock model."""

import secateur

model = secateur.open_model("bundled")
for repair in (False, True):
    plan = secateur.make_plan(
        model, method="obs-width", remove=0.2, texts="python-stdlib", windows=8, settings={"repair": repair}
    )
    pruned = secateur.prune(model, plan)
    result = secateur.evaluate(pruned, texts="python-stdlib", windows=8)[0]
    print(f"repair={repair}: {type(pruned.module).__name__}, {plan.steps[0].describe()[1]}")
    print(f"  {plan.removed_fraction:.1%} smaller, held-out perplexity {result.value:.2f}")
