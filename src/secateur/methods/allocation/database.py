"""The levels of all branches and what the loss makes of them: measured once for a model and texts, kept on disk.

Every budget, aim and setting of the search reads the same measurements. A killed process leaves the blocks it has
finished; the next one goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from secateur.data.windows import Windows
from secateur.distributed import from_main_process, is_main_process
from secateur.errors import InputError
from secateur.files import cache_folder, replace_file
from secateur.methods.allocation.levels import Branch, Grid, Writers, measure_levels
from secateur.methods.allocation.sensitivity import Reaction, reactions
from secateur.models.decoder import Decoder
from secateur.reading import MIB, FileKind
from secateur.run_options import DEFAULTS, RunOptions
from secateur.versions import digest

_FORMAT = 1
_RECORD = FileKind("measurements of widths", 64 * MIB)


@dataclass(frozen=True)
class Database:
    """What was measured.

    Attributes:
        branches: all branches of the free blocks, and their levels.
        reactions: of each, in the same order.
    """

    branches: tuple[Branch, ...]
    reactions: tuple[Reaction, ...]


def open_database(
    decoder: Decoder, windows: Windows, free: Sequence[int], grid: Grid, *, options: RunOptions = DEFAULTS
) -> Database:
    """Read the measurements of a model on these windows, or make and keep them.

    Raises:
        InputError: the cache cannot be written.
        NumericsError: NaN or infinity on the way.
    """
    place = (str(decoder.module.dtype), decoder.device.type, options.batch_size)
    key = digest(_FORMAT, decoder.fingerprint, place, windows.fingerprint, list(free), asdict(grid))
    folder = cache_folder("widths", key)
    found: Database | None = from_main_process(_read(folder / "levels.json"))
    if found is None:
        found = from_main_process(_measured(decoder, windows, free, grid, folder, options))
    return found


def _measured(
    decoder: Decoder, windows: Windows, free: Sequence[int], grid: Grid, folder: Path, options: RunOptions
) -> Database:
    blocks = _Blocks(folder)
    for index, rows in measure_levels(decoder, windows, free, grid, blocks, options=options):
        blocks.add(index, rows)
    branches = [one for index in free for one in blocks.branches(index)]
    worth = reactions(decoder, windows, branches, blocks.writers, options=options)
    found = Database(tuple(branches), tuple(worth))
    if is_main_process():
        replace_file(folder / "levels.json", json.dumps(asdict(found)) + "\n")
        blocks.drop()
    return found


class _Blocks:
    """A file for each block with its branches and their output projections at the level between."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, list[Branch]] = {}

    def __contains__(self, block: int) -> bool:
        if block not in self._known:
            read = from_main_process(_branches_of(self._path(block)))
            if read is not None:
                self._known[block] = read
        return block in self._known

    def add(self, block: int, rows: Sequence[tuple[Branch, Writers]]) -> None:
        tensors = {f"{one.part}.{number}": writer for one, own in rows for number, writer in enumerate(own)}
        record = json.dumps([asdict(one) for one, _ in rows])
        if is_main_process():
            replace_file(self._path(block), save(tensors, {"branches": record}))
        self._known[block] = [one for one, _ in rows]

    def branches(self, block: int) -> list[Branch]:
        return self._known[block] if block in self else []

    def writers(self, branch: Branch) -> Writers:
        with safe_open(self._path(branch.block), framework="pt") as file:
            names = [name for name in file.keys() if name.startswith(f"{branch.part}.")]  # noqa: SIM118 - not a dict
            return tuple(file.get_tensor(f"{branch.part}.{number}") for number in range(len(names)))

    def drop(self) -> None:
        for path in self._folder.glob("block-*.safetensors"):
            path.unlink(missing_ok=True)

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block}.safetensors"


def _branch(row: dict[str, Any]) -> Branch:
    return Branch(row["block"], row["part"], tuple(row["keep"]), tuple(row["errors"]), row["probe"])


def _branches_of(path: Path) -> list[Branch] | None:
    """Read the branches of a block; None if there is no file, or a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return [_branch(row) for row in json.loads(file.metadata()["branches"])]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None


def _read(path: Path) -> Database | None:
    """Read finished measurements; None if there are none, or they are damaged."""
    if not path.exists():
        return None
    try:
        found = _RECORD.json(path)
        branches = tuple(_branch(row) for row in found["branches"])
        return Database(branches, tuple(Reaction(**row) for row in found["reactions"]))
    except (InputError, KeyError, TypeError):
        return None
