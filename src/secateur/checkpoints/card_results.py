"""Measurements on a model card: a table for people, `model-index` for programs."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from huggingface_hub import EvalResult, ModelCard

from secateur.evaluation.results import Result

_BEGIN, _END = "<!-- secateur: results -->", "<!-- secateur: end of results -->"


def with_results(card: ModelCard, results: Sequence[Result], name: str) -> ModelCard:
    """Put results on a card, in the place of those that were there; the rest of its text stays.

    Args:
        card: the card as it is.
        results: of the model (role `model`) and, where it was measured too, of the dense one (role `against`).
        name: the model's name on the hub.
    """
    section = f"{_BEGIN}\n## Results\n\n{_table(results)}\n{_END}"
    text = re.sub(f"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "\n", card.text, flags=re.DOTALL)
    new = ModelCard(f"---\n{card.data.to_yaml()}\n---\n{text.rstrip()}\n\n{section}\n")
    data: Any = new.data
    data.model_name = name
    data.eval_results = [_entry(one) for one in results if one.role == "model" and _on_a_data_set(one)]
    return new


def _table(results: Sequence[Result]) -> str:
    """One row per measurement: this model, and the dense one where it was measured in the same run."""
    dense = {_what(one): one for one in results if one.role == "against"}
    rows = ["| measure | this model | dense |", "|---|---|---|"]
    for one in results:
        if one.role == "model":
            other = dense.get(_what(one))
            rows.append(f"| {_what(one)} | {_number(one)} | {_number(other) if other else '–'} |")
    return "\n".join(rows)


def _what(one: Result) -> str:
    asked = [f"{name} {one.settings[name]}" for name in ("batch", "prompt") if name in one.settings]
    where = one.task or (one.texts.get("source") if one.texts else None)
    return ", ".join([one.measure.replace("_", " "), *([where] if where else []), *asked])


def _number(one: Result) -> str:
    shown = f"{one.value:,.0f}" if abs(one.value) >= 10_000 else f"{one.value:.4g}"
    return shown + (f" ± {one.spread['stderr']:.2g}" if "stderr" in one.spread else "")


def _on_a_data_set(one: Result) -> bool:
    return one.measure == "perplexity" or one.task not in (None, "average")


def _entry(one: Result) -> EvalResult:
    source = one.task or one.texts["source"]
    return EvalResult(
        task_type="text-generation",
        dataset_type=source,
        dataset_name=source,
        metric_type=one.measure,
        metric_value=round(one.value, 4),
    )
