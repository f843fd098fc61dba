"""What cuts of a real model can still do, beside their perplexity: probes, on SmolLM2-135M-Instruct.

    python benchmarks/probes_table.py FILE.gguf               # half an hour on two cores; `make real` fetches the file
    python benchmarks/probes_table.py FILE.gguf --only sleb   # only this cut

The dense model is asked every probe, once; the cuts those that it can do.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from common import RESULTS, keep

import secateur
from secateur.evaluation.gate import Gate, accuracies_in
from secateur.evaluation.metrics.perplexity import GEOMEAN, ratios_by_source
from secateur.models.decoder import Decoder

HELD_OUT = "python-stdlib,python-docs"
READING = {"texts": HELD_OUT, "windows": 16, "seq_len": 256}
CALIBRATION = {"texts": "python-stdlib,python-docs", "windows": 24, "seq_len": 256}
DENSE = {"model": "dense"}
GATE = Gate.read("probes:0.9")
CUTS: dict[str, dict[str, Any]] = {
    "obs-width": {"method": "obs-width", "remove": 0.15},
    "replaceme": {"method": "replaceme", "blocks": 3},
    "obs-width, calibrated on code alone": {"method": "obs-width", "remove": 0.15, "texts": "python-stdlib"},
    "shortgpt": {"method": "shortgpt", "blocks": 3},
    "obs-width, a little": {"method": "obs-width", "remove": 0.05},
    "sleb": {"method": "sleb", "blocks": 3},
}


def main() -> None:
    """Measure the dense model if that was not done before, then each cut."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*", choices=CUTS, default=list(CUTS))
    given = parser.parse_args()
    dense = secateur.open_model(given.file, dtype="bfloat16")
    before = _known() or _asked(dense, GATE.probes, DENSE, {})
    able = GATE.able(before)
    for name in given.only:
        asked = CALIBRATION | CUTS[name]
        cut = secateur.prune(dense, secateur.make_plan(dense, **asked))
        results = secateur.evaluate(cut, against=dense, **READING)
        ratios = ratios_by_source(results) | {"mean": next(one.value for one in results if one.measure == GEOMEAN)}
        facts = {"removed": 1 - cut.parameter_count / dense.parameter_count}
        _asked(cut, able, {"model": name} | asked, facts | {"ratios": ratios}, before)


def _asked(
    model: Decoder,
    probes: tuple[str, ...],
    setting: dict[str, Any],
    facts: dict[str, Any],
    before: dict[str, float] | None = None,
) -> dict[str, float]:
    """Ask a model probes, and keep what came of it."""
    begun = time.perf_counter()
    found = accuracies_in(secateur.evaluate(model, tasks=list(probes)))
    gate = {"gate": str(GATE), "fails": GATE.failing(before, before | found)} if before else {}
    seconds = round(time.perf_counter() - begun)
    keep("probes", setting, _rounded(facts) | {"accuracy": _rounded(found)} | gate | {"seconds": seconds})
    return found


def _known() -> dict[str, float] | None:
    file = RESULTS / "probes.jsonl"
    lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
    found: list[dict[str, float]] = [one["found"]["accuracy"] for one in lines if one["setting"] == DENSE]
    return found[-1] if found else None


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _rounded(one) if isinstance(one, dict) else round(one, 4) for name, one in values.items()}


if __name__ == "__main__":
    main()
