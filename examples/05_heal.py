"""Remove blocks from the bundled model, heal it with low-rank updates, and measure what was recovered."""

import secateur

model = secateur.open_model("bundled")
plan = secateur.make_plan(model, method="replaceme", blocks=3, texts="python-stdlib")
pruned = secateur.prune(model, plan)
healed = secateur.heal(pruned, by="lora", texts="python-stdlib", tokens=50_000)

facts = healed.history[-1]["healing"]
print(f"{facts['trained_weights']:,} weights trained on {facts['tokens']:,} tokens")
for name, candidate in {"pruned": pruned, "healed": healed}.items():
    result, dense = secateur.evaluate(candidate, against=model, texts="python-stdlib", windows=16)
    print(f"{name}: perplexity {result.value:.2f}, dense {dense.value:.2f}")
