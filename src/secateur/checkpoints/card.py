"""The model card of a pruned checkpoint: base model, steps, how to open it, and results."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from yaml import YAMLError

from secateur.checkpoints.folders import is_ours
from secateur.errors import SecateurWarning, first_line
from secateur.evaluation.results import Result
from secateur.models.decoder import Decoder
from secateur.models.fetch import HUB_NAME
from secateur.models.wrappers import auto_class
from secateur.plan.plan import plans_in

_OPENING = '.from_pretrained("'

RELATION = "finetune"
"""The Hub's relation to the base model; of its kinds (adapter, merge, quantized, finetune) the closest."""

_INHERITED = ("license", "license_name", "license_link", "language")


def model_card(decoder: Decoder, record: dict[str, Any]) -> ModelCard:
    """Return the card; licence and languages are copied from the original's card if it has one.

    Args:
        decoder: the saved model.
        record: the content of `secateur.json`.
    """
    original = _original_card(decoder.folder)
    base = _base_model(decoder, record["base_model"], original)
    related: dict[str, Any] = {"base_model_relation": RELATION} if base else {}
    data = ModelCardData(
        base_model=base,
        library_name="transformers",
        pipeline_tag="image-text-to-text" if decoder.is_wrapped else "text-generation",
        tags=["secateur", *["pruned"] * bool(record["history"]), *methods_in(record["history"])],
        **{key: original[key] for key in _INHERITED if key in original},
        **related,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(decoder, record)}")


def methods_in(history: Iterable[dict[str, Any]]) -> list[str]:
    """Return the unique methods in a checkpoint's history, in order, including `heal-lora` and the like."""
    found = []
    for entry in history:
        found += [step.method for plan in plans_in([entry]) for step in plan.steps]
        found += [f"heal-{entry['healing']['with']}"] if "healing" in entry else []
    return list(dict.fromkeys(found))


def opened_from(text: str, name: str) -> str:
    """Return a card's text whose example opens the model by this name."""
    return re.sub(f'{re.escape(_OPENING)}[^"]*', lambda _: f"{_OPENING}{name}", text, count=1)


def _base_model(decoder: Decoder, source: str, original: dict[str, Any]) -> str | None:
    """Return the dense model's Hub name, if it has one; the path of a local folder is useless to others."""
    if _is_on_hub(source):
        return source
    ours = decoder.folder is not None and is_ours(decoder.folder)
    return original.get("base_model") if ours else None


def _is_on_hub(source: str) -> bool:
    return HUB_NAME.fullmatch(source) is not None and not Path(source).exists()


def _body(decoder: Decoder, record: dict[str, Any]) -> str:
    base = record["base_model"]
    name = Path(base).name
    shown = base if _is_on_hub(base) else name
    done = [row for entry in record["history"] for row in _rows(entry)]
    opens = auto_class(decoder.module.config).__name__
    title = f"# {name}, {'pruned' if done else 'converted'}"
    lines = [title, "", f"Made from `{shown}` with secateur {record['secateur']}.", ""]
    lines += ["| step | method | what it did |", "|---|---|---|"] if done else []
    lines += [f"| {number} | {method} | {what} |" for number, (method, what) in enumerate(done, 1)]
    before, after = record["parameters_before"], record["parameters_after"]
    size = f"{before:,} before, {after:,} after ({1 - after / before:.1%} removed)" if done else f"{after:,}"
    lines += [
        "",
        f"Parameters: {size}. Blocks: {decoder.block_count}.",
        "",
        "```python",
        f"from transformers import {opens}",
        f'model = {opens}{_OPENING}path/to/this/folder"{_own_code(decoder)})',
        "```",
        "",
        "Plan, settings, versions and fingerprints: `secateur.json`.",
        "",
    ]
    return "\n".join(lines)


def _rows(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the table rows of one entry of the history: the steps of a plan, or a healing."""
    if "healing" in entry:
        facts = entry["healing"]
        return [(f"heal, {facts['with']}", f"trained on {facts['tokens']:,} tokens of {facts['texts']['source']}")]
    return [(step.method, " ".join(step.describe())) for plan in plans_in([entry]) for step in plan.steps]


def _own_code(decoder: Decoder) -> str:
    return ", trust_remote_code=True" if decoder.has_own_code else ""


def _original_card(folder: Path | None) -> dict[str, Any]:
    readme = folder / "README.md" if folder else None
    if readme is None or not readme.is_file():
        return {}
    try:
        return ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except (OSError, ValueError, TypeError, YAMLError) as error:
        warnings.warn(
            f"{readme}: not readable ({first_line(error)}); licence and languages are not taken over",
            SecateurWarning,
            stacklevel=4,
        )
        return {}


_BEGIN, _END = "<!-- secateur: results -->", "<!-- secateur: end of results -->"


def with_results(card: ModelCard, results: Sequence[Result], name: str) -> ModelCard:
    """Return a card with these results in place of earlier ones; the rest of its text is kept.

    Args:
        card: the card.
        results: of the model (role `model`) and, if measured, of the dense one (role `against`).
        name: the model's name on the Hub.
    """
    section = f"{_BEGIN}\n## Results\n\n{_table(results)}\n{_END}"
    text = re.sub(f"\n*{re.escape(_BEGIN)}.*?{re.escape(_END)}\n*", "\n", card.text, flags=re.DOTALL)
    new = ModelCard(f"---\n{card.data.to_yaml()}\n---\n{text.rstrip()}\n\n{section}\n")
    data: Any = new.data
    data.model_name = name
    data.eval_results = [_entry(one) for one in results if one.role == "model" and _on_a_data_set(one)]
    return new


def _table(results: Sequence[Result]) -> str:
    """Return a table with a row per measurement: this model, and the dense one if measured in the same run."""
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
