"""All methods by name, and how their steps are applied. A new file of methods is named here and nowhere else."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

from secateur.errors import unknown
from secateur.methods import (
    drop_blocks,
    linear_replacement,
    merge_blocks,
    prune_width,
    replace_blocks,
    slice_hidden,
)
from secateur.methods.method import Applied, Measurements, Method
from secateur.methods.search import auto
from secateur.models.decoder import Decoder
from secateur.plan.steps import AnyStep as Step

_FILES: tuple[ModuleType, ...] = (
    drop_blocks,
    replace_blocks,
    merge_blocks,
    linear_replacement,
    slice_hidden,
    prune_width,
)

APPLY: dict[str, Callable[[Measurements, Any], Decoder | Applied]] = {
    kind: edit for file in _FILES for kind, edit in file.APPLY.items()
}
"""How each kind of step is applied: from measurements of the model before it, and the step, to the new model."""

_SINGLE: dict[str, Method] = {method.name: method for file in _FILES for method in file.METHODS}


def apply_step(measurements: Measurements, step: Step) -> Applied:
    """Apply one step to the model that `measurements` are of.

    Raises:
        InputError: the step cannot be applied to this model.
    """
    found = APPLY[step.kind](measurements, step)
    return found if isinstance(found, Applied) else Applied(found)


METHODS: dict[str, Method] = _SINGLE | {"auto": auto.method_over(_SINGLE, apply_step)}


def find_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        InputError: no such method; the known ones are named.
    """
    if name not in METHODS:
        raise unknown("method", name, list(METHODS))
    return METHODS[name]
