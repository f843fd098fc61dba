"""What cuts of a real model can still do, beside their perplexity: every probe, on SmolLM2-135M-Instruct.

python benchmarks/probes_table.py FILE.gguf               # half an hour on two cores; `make real` fetches the file
python benchmarks/probes_table.py FILE.gguf --only sleb   # the dense model is measured again, and this cut
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from common import keep

import secateur
from secateur.evaluation.gate import Gate
from secateur.evaluation.metrics.perplexity import GEOMEAN
from secateur.evaluation.probes import PROBES
from secateur.evaluation.results import Result
from secateur.jobs.evaluate import measure_reference
from secateur.models.decoder import Decoder

HELD_OUT = "python-stdlib,python-docs"
READING = {"texts": HELD_OUT, "windows": 16, "seq_len": 256}
GATE = "probes:0.9"
CUTS: dict[str, dict[str, Any]] = {
    "obs-width": {"method": "obs-width", "remove": 0.15},
    "obs-width, calibrated on code": {"method": "obs-width", "remove": 0.15, "texts": "python-stdlib"},
    "replaceme": {"method": "replaceme", "blocks": 3},
    "shortgpt": {"method": "shortgpt", "blocks": 3},
    "obs-width, a little": {"method": "obs-width", "remove": 0.05},
    "sleb": {"method": "sleb", "blocks": 3},
}
CALIBRATION = {"texts": "python-stdlib,python-docs", "windows": 24, "seq_len": 256}


def main() -> None:
    """Measure the dense model, then each cut."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--only", nargs="*", choices=CUTS, default=list(CUTS))
    given = parser.parse_args()
    dense = secateur.open_model(given.file, dtype="bfloat16")
    begun = time.perf_counter()
    reference = measure_reference(dense, tasks="probes", **READING)
    before = _accuracies(reference.results)
    keep("probes", {"model": "dense"}, {"accuracy": before, "seconds": round(time.perf_counter() - begun)})
    for name in given.only:
        cut = _cut(dense, **(CALIBRATION | CUTS[name]))
        begun = time.perf_counter()
        results = secateur.evaluate(cut, against=reference, tasks="probes", **READING)
        after = _accuracies(one for one in results if one.role == "model")
        keep(
            "probes",
            {"model": name, "calibration": CUTS[name].get("texts", CALIBRATION["texts"])} | CUTS[name],
            {
                "removed": round(1 - cut.parameter_count / dense.parameter_count, 4),
                "ratios": _ratios(results),
                "accuracy": after,
                "gate": GATE,
                "fails": Gate.read(GATE).failing(before, after),
                "seconds": round(time.perf_counter() - begun),
            },
        )


def _cut(dense: Decoder, **how: Any) -> Decoder:
    plan = secateur.make_plan(dense, **how)
    return secateur.prune(dense, plan)


def _accuracies(results: Any) -> dict[str, float]:
    return {one.task: round(one.value, 4) for one in results if one.task in PROBES and one.measure == "acc"}


def _ratios(results: list[Result]) -> dict[str, float]:
    """Return perplexity ÷ the dense model's by source, and their geometric mean."""
    read = [one for one in results if one.task is None and one.measure == "perplexity"]
    before = {one.texts["source"]: one.value for one in read if one.role == "against"}
    found = {one.texts["source"]: one.value / before[one.texts["source"]] for one in read if one.role == "model"}
    mean = next(one.value for one in results if one.measure == GEOMEAN)
    return {name: round(value, 4) for name, value in (found | {"mean": mean}).items()}


if __name__ == "__main__":
    main()
