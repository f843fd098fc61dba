"""Look-ups: a method by its name, and how a step is applied."""

from __future__ import annotations

from secateur.errors import InputError
from secateur.methods.method import APPLY, METHODS, Applied, Measurements, Method
from secateur.plan.step import Step

__all__ = ["APPLY", "METHODS", "apply_step", "find_method"]


def find_method(name: str) -> Method:
    """Return the method of this name.

    Raises:
        InputError: no such method; the known ones are named.
    """
    return METHODS.find(name)


def apply_step(measurements: Measurements, step: Step) -> Applied:
    """Apply one step to the model that `measurements` are of.

    Raises:
        InputError: the step cannot be applied to this model, or no function applies steps of its kind.
    """
    METHODS.load()
    if type(step) not in APPLY:
        raise InputError(f"no function applies steps of kind '{step.kind}'; register one with @applies.")
    found = APPLY[type(step)](measurements, step)
    return found if isinstance(found, Applied) else Applied(found)
