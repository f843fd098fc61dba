"""Registries: things known by name, found in the modules of one of our packages and in installed ones.

A decorator registers what a module defines. Modules are imported on first use, so that a new file, or an installed
package with an entry point, is found without an edit of a list.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Generic, TypeVar

from secateur.errors import InputError, unknown

Item = TypeVar("Item")


@dataclass(frozen=True)
class _Entry(Generic[Item]):
    """What is registered, its place in listings, and the module that defines it."""

    item: Item
    order: int
    module: str
    position: int


class Registry(Mapping[str, Item], Generic[Item]):
    """Named things of one kind; iterated by order, then by module, then as a module defines them."""

    def __init__(self, what: str, *, package: str, groups: tuple[str, ...]) -> None:
        """Start empty; nothing is imported before the first look-up.

        Args:
            what: what it holds, for messages: `method`.
            package: the package whose modules are all imported, those of packages in it too.
            groups: groups of entry points that are loaded after it.
        """
        self._what, self._package, self._groups = what, package, groups
        self._entries: dict[str, _Entry[Item]] = {}
        self._found = False

    def add(self, name: str, item: Item, *, module: str, order: int = 0) -> None:
        """Register a thing.

        Raises:
            InputError: the name is taken.
        """
        if name in self._entries:
            raise InputError(
                f"the {self._what} '{name}' is defined twice, in {self._entries[name].module} and in {module}; rename "
                "or uninstall one of them."
            )
        self._entries[name] = _Entry(item, order, module, len(self._entries))

    def find(self, name: str) -> Item:
        """Return the thing of this name.

        Raises:
            InputError: no such thing; the known ones are named. Or an installed package cannot be imported.
        """
        if name not in self:
            raise unknown(self._what, name, list(self))
        return self[name]

    def load(self) -> None:
        """Import everything that may register something; again does nothing.

        Raises:
            InputError: an installed package cannot be imported, or registers a name that is taken.
        """
        if self._found:
            return
        self._found = True  # modules may look up others while they are imported
        try:
            path = import_module(self._package).__path__
            for module in pkgutil.walk_packages(path, f"{self._package}."):
                import_module(module.name)
            for group in self._groups:
                for entry_point in sorted(entry_points(group=group), key=lambda one: one.name):
                    _load(entry_point)
        except BaseException:
            self._found = False
            raise

    def __getitem__(self, name: str) -> Item:
        self.load()
        return self._entries[name].item

    def __iter__(self) -> Iterator[str]:
        self.load()
        key = {name: (one.order, one.module, one.position) for name, one in self._entries.items()}
        return iter(sorted(key, key=key.__getitem__))

    def __len__(self) -> int:
        self.load()
        return len(self._entries)


def _load(entry_point: EntryPoint) -> None:
    package = entry_point.dist.name if entry_point.dist else entry_point.module
    try:
        entry_point.load()
    except (ImportError, AttributeError, SyntaxError, InputError) as error:
        raise InputError(
            f"the installed package {package} cannot be used (entry point {entry_point.group}: {entry_point.value}): "
            f"{error}. Repair or uninstall it."
        ) from error
