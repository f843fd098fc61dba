"""Calibrate on your own token windows, and compare depth methods at the same number of blocks."""

import tempfile
from pathlib import Path

import numpy as np

import secateur

model = secateur.open_model("bundled")
assert model.tokenizer is not None
text = (Path(secateur.__file__).parent / "plan" / "plan.py").read_text(encoding="utf-8")
tokens = model.tokenizer(text)["input_ids"]
folder = Path(tempfile.mkdtemp())
np.save(folder / "windows.npy", np.asarray(tokens[: len(tokens) // 128 * 128]).reshape(-1, 128))

for method in ("shortgpt", "uidl", "streamline", "last-n", "shortened-llama"):
    plan = secateur.make_plan(model, method=method, blocks=2, texts=folder / "windows.npy")
    (result,) = secateur.evaluate(secateur.prune(model, plan), texts="python-stdlib", windows=16)
    print(f"{method:16} {' '.join(plan.steps[0].describe())}: held-out perplexity {result.value:.2f}")
