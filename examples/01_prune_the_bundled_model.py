"""Score, plan, prune, save and evaluate the bundled model in ten lines."""

import secateur

model = secateur.open_model("bundled")
scores = secateur.score(model, texts="python-stdlib")
print("block influence:", [round(value, 3) for value in scores.block_influence or ()])

plan = secateur.make_plan(model, method="replaceme", remove=0.25, texts="python-stdlib", scores=scores)
print(*plan.steps[0].describe(), f"({plan.removed_fraction:.1%} of the parameters)")

pruned = secateur.prune(model, plan)
secateur.save(pruned, "secateur-runs/example-cut")
for result in secateur.evaluate(pruned, against=model, texts="python-stdlib"):
    print(f"{result.role}: {result.blocks} blocks, perplexity {result.value:.2f}")
