"""All methods by name. A new method adds its rows here and nowhere else."""

from __future__ import annotations

from secateur.errors import unknown
from secateur.methods import drop_blocks
from secateur.methods.method import Method

METHODS: dict[str, Method] = {method.name: method for method in drop_blocks.METHODS}


def find_method(name: str) -> Method:
    """Give the method of this name.

    Raises:
        InputError: no such method; the known ones are named.
    """
    if name not in METHODS:
        raise unknown("method", name, list(METHODS))
    return METHODS[name]
