"""Check what `secateur demo` left behind: dense and pruned perplexity, pictures, and a proved checkpoint."""

import json
import sys
from pathlib import Path

folder = Path(sys.argv[1])
results = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
pruned, dense = results
assert [pruned["role"], dense["role"]] == ["model", "against"], results
assert 10 < dense["value"] < 25, dense
assert dense["value"] < pruned["value"] < 5 * dense["value"], (dense["value"], pruned["value"])
assert pruned["parameters"] < 0.85 * dense["parameters"], (pruned["parameters"], dense["parameters"])
assert pruned["texts"]["fingerprint"] == dense["texts"]["fingerprint"]
record = json.loads((folder / "cut" / "secateur.json").read_text())
assert record["check"]["passed"], record["check"]
assert record["check"]["without_secateur"], record["check"]
for name in ("scores.json", "plan.json", "redundancy.png", "cosine.png", "cka.png", "cut/model.safetensors"):
    assert (folder / name).stat().st_size > 0, name
sys.stdout.write(f"demo checked: perplexity {dense['value']:.2f} dense, {pruned['value']:.2f} pruned\n")
