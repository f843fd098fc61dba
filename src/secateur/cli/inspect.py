"""The command `inspect`, alone in its module: it answers as soon as transformers is imported."""

from __future__ import annotations

from secateur.cli.options import Opening, grouped
from secateur.cli.tables import facts_table
from secateur.cli.terminal import Json, ModelArg, answer, opened
from secateur.models.inspection import inspect as inspect_model


@grouped
def inspect(model: ModelArg, opening: Opening, as_json: Json = False) -> None:
    """Show a model's architecture and parameter counts; reads no weights unless they are pickled."""
    facts = inspect_model(opened(opening, model, only_shapes=True))
    answer(facts, facts_table(model, facts), as_json=as_json)
