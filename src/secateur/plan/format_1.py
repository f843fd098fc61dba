"""Convert plans of format 1, as secateur wrote them up to 0.1, to format 2.

Format 1 had other names for two kinds of steps, and kept some of what applying needs among the settings of the method,
where each reader had its own defaults; those defaults are written out here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Data = dict[str, Any]


def from_format_1(plan: Data) -> Data:
    """Return the data of a plan in format 2; anything that is not a list of steps is left for validation to refuse."""
    steps = plan.get("steps", [])
    if isinstance(steps, list | tuple):
        steps = [_step(step) if isinstance(step, dict) else step for step in steps]
    return plan | {"format": 2, "steps": steps}


def _step(step: Data) -> Data:
    kind, settings = step.get("kind"), step.get("settings") or {}
    if not isinstance(kind, str) or not isinstance(settings, dict):
        return step
    typed = _TYPED.get(kind, lambda _step, _settings: {})
    return step | {"kind": _KINDS.get(kind, kind)} | typed(step, settings)


_KINDS = {"narrow-blocks": "prune-width", "linearize-blocks": "linear-replacement"}


def _slicing(step: Data, settings: Data) -> Data:
    if step.get("bases") is None:
        return {"signals": settings.get("signals", "raw")}
    return {
        "signals": settings.get("signals", "normed"),
        "sensitivity": not step.get("coordinates", False) and settings.get("sensitivity", True),
        "reconstruct": settings.get("reconstruct", True),
    }


def _replacement(_: Data, settings: Data) -> Data:
    return {"loss": settings.get("loss", "mse"), "pairs": settings.get("pairs")}


_TYPED: dict[str, Callable[[Data, Data], Data]] = {"slice-hidden": _slicing, "replace-blocks": _replacement}
