"""The model card of a pruned checkpoint: what it came from, what was cut, how it was measured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from secateur.models.decoder import Decoder
from secateur.plan import plans_in
from secateur.shapes import SecateurConfig


def model_card(decoder: Decoder, record: dict[str, Any]) -> ModelCard:
    """Write the card; licence and languages are taken over from the original's card where it has one."""
    original = _original_card(decoder.folder)
    inherited = {k: original[k] for k in ("license", "license_name", "license_link", "language") if k in original}
    data = ModelCardData(
        base_model=None if decoder.source == "bundled" else decoder.source,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["secateur", "pruned"],
        **inherited,
    )
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_body(decoder, record)}")


def _body(decoder: Decoder, record: dict[str, Any]) -> str:
    name = Path(decoder.source).name
    lines = [f"# {name}, pruned", "", f"Made from `{decoder.source}` with secateur {record['secateur']}.", ""]
    lines += ["| step | method | what it did |", "|---|---|---|"]
    done = [row for entry in record["history"] for row in _rows(entry)]
    lines += [f"| {number} | {method} | {what} |" for number, (method, what) in enumerate(done, 1)]
    before, after = record["parameters_before"], record["parameters_after"]
    lines += [
        "",
        f"Parameters: {before:,} before, {after:,} after ({1 - after / before:.1%} removed). "
        f"Blocks: {decoder.block_count}.",
        "",
        "```python",
        "from transformers import AutoModelForCausalLM",
        f'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder"{_own_code(decoder)})',
        "```",
        "",
        "Plan, settings, versions and fingerprints: `secateur.json`.",
        "",
    ]
    return "\n".join(lines)


def _rows(entry: dict[str, Any]) -> list[tuple[str, str]]:
    """Say what one entry of the history did: the steps of a plan, or a training."""
    if "healing" in entry:
        facts = entry["healing"]
        return [(f"heal, {facts['with']}", f"trained on {facts['tokens']:,} tokens of {facts['texts']['source']}")]
    return [(step.method, " ".join(step.says())) for plan in plans_in([entry]) for step in plan.steps]


def _own_code(decoder: Decoder) -> str:
    return ", trust_remote_code=True" if isinstance(decoder.config, SecateurConfig) else ""


def _original_card(folder: Path | None) -> dict[str, Any]:
    readme = folder / "README.md" if folder else None
    if readme is None or not readme.is_file():
        return {}
    return ModelCard(readme.read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
