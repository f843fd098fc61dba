"""Reading settings by name: names and values are checked, and errors list the possible ones."""

from __future__ import annotations

from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from secateur.errors import InputError, unknown

Model = TypeVar("Model", bound=BaseModel)


def read_settings(whose: str, settings: type[Model], given: dict[str, Any]) -> Model:
    """Check settings given by name.

    Raises:
        InputError: an unknown setting (the message lists the known ones) or an invalid value.
    """
    known = list(settings.model_fields)
    for name in given:
        if name not in known:
            raise unknown(f"setting of {whose}", name, known)
    try:
        return settings.model_validate(given)
    except ValidationError as error:
        problem = error.errors()[0]
        name = ".".join(map(str, problem["loc"]))
        raise InputError(f"{whose}: {name}={problem['input']}: {problem['msg']}.") from error


def describe_settings(settings: type[BaseModel]) -> dict[str, str]:
    """Return the description and default of each setting."""
    return {n: f"{f.description} (default: {f.default})" for n, f in settings.model_fields.items()}
