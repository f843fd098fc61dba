"""What widths cost, block by block: measured once for a model and texts, kept on disk.

Every budget, aim and setting of the search reads the same measurements. A killed process leaves the blocks it has
finished; the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from secateur.calibration.walk import open_store
from secateur.distributed import from_main_process, is_main_process
from secateur.files import cache_folder, replace_file
from secateur.methods.allocation.levels import Keep, Levels, Writers, levels_by_branch, measure_levels
from secateur.methods.allocation.sensitivity import Reaction, judging_windows, reactions
from secateur.methods.greedy import greedily
from secateur.methods.method import Measurements
from secateur.methods.records import recorded
from secateur.scores.divergence import OutputChange, kl_divergence
from secateur.scores.removal import Branch
from secateur.surgery.width.coupling import Part
from secateur.versions import digest

_FORMAT = 7
_TOKENS = 512
"""Tokens on which the order of attention is measured, about."""
_MOST_LOST = 1.0
"""Nats after which no more attention is tried."""


@dataclass(frozen=True)
class Database:
    """What was measured.

    Attributes:
        branches: levels of the MLPs of the free blocks, and of attention where single key/value groups may go.
        reactions: of the predictions to each, in the same order.
        attention: blocks in the order in which their attention goes.
        lost: what is lost, in nats, without the first 1, 2, 3, … of them.
    """

    branches: tuple[Levels, ...]
    reactions: tuple[Reaction, ...]
    attention: tuple[int, ...] = ()
    lost: tuple[float, ...] = ()

    def levels(self, part: Part) -> dict[int, Keep]:
        """Return the units that may stay in each block, of one part."""
        return {one.block: one.keep for one in self.branches if one.part == part}


_DATABASE = TypeAdapter(Database)
_LEVELS = TypeAdapter(tuple[Levels, ...])


def open_database(
    measurements: Measurements,
    free: Sequence[int],
    multiple: int,
    attention: Sequence[int],
    *,
    single: bool = False,
    candidates: float | None = None,
) -> Database:
    """Read the measurements of a model on its windows, or make and keep them.

    Args:
        measurements: of the dense model.
        free: blocks that may lose something.
        multiple: channels stay in multiples of this.
        attention: blocks whose attention may go.
        single: whether single key/value groups of it may go.
        candidates: channels that go are among the smallest, this share of all; None: among all.

    Raises:
        InputError: there are no windows, or the cache cannot be written.
        NumericsError: NaN or infinity on the way.
    """
    decoder, windows = measurements.decoder, measurements.need_windows()
    place = (str(decoder.module.dtype), decoder.device.type, measurements.options.batch_size)
    key = digest(
        _FORMAT,
        decoder.fingerprint,
        place,
        windows.fingerprint,
        list(free),
        multiple,
        list(attention),
        single,
        candidates,
    )
    folder = cache_folder("widths", key)
    levels = levels_by_branch(decoder, free, multiple, attention if single else ())
    blocks = _Blocks(folder)

    def measured() -> Database:
        return _measured(measurements, levels, attention, blocks, candidates)

    found = recorded(folder / "levels.json", _DATABASE, measured)
    blocks.drop()
    return found


def _measured(
    measurements: Measurements,
    levels: Mapping[Branch, Keep],
    attention: Sequence[int],
    blocks: _Blocks,
    candidates: float | None,
) -> Database:
    decoder, windows, options = measurements.decoder, measurements.need_windows(), measurements.options
    for measured in measure_levels(decoder, windows, levels, blocks, candidates=candidates, options=options):
        blocks.add(measured)
    branches = [one for block in dict.fromkeys(block for block, _ in levels) for one in blocks.levels(block)]
    worth = reactions(decoder, windows, branches, blocks.writers, options=options)
    order, lost = attention_chain(measurements, attention) if attention else ((), ())
    return Database(tuple(branches), tuple(worth), order, lost)


def attention_chain(measurements: Measurements, removable: Sequence[int]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return blocks in the order in which their attention goes at the least loss, and what is lost after each, in nats.

    What one attention costs depends on which others are gone: each alone is cheap, most of them together ruin a model.
    The order ends where more than one nat is lost, and one attention always stays.
    """
    decoder = measurements.decoder
    judged = judging_windows(measurements.need_windows(), _TOKENS)
    candidates: list[Branch] = [(index, "heads") for index in removable]
    order: list[int] = []
    lost: list[float] = []
    with open_store(decoder) as store:
        change = OutputChange(store, kl_divergence)
        for gone, loss in greedily(measurements, candidates, windows=judged, measure=change, name="attention"):
            if len(gone) == decoder.block_count or loss > _MOST_LOST:
                break
            order.append(gone[-1][0])
            lost.append(max(loss, lost[-1] if lost else 0.0))
    return tuple(order), tuple(lost)


class _Blocks:
    """A file for each block with the levels of its branches and their output projections at the level between."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._known: dict[int, tuple[Levels, ...]] = {}

    def __contains__(self, block: int) -> bool:
        if block not in self._known:
            read = from_main_process(_levels_in(self._path(block)))
            if read is not None:
                self._known[block] = read
        return block in self._known

    def add(self, measured: Sequence[tuple[Levels, Writers]]) -> None:
        levels = tuple(one for one, _ in measured)
        path = self._path(levels[0].block)
        tensors = {f"{one.part}.{number}": w for one, writers in measured for number, w in enumerate(writers)}
        if is_main_process():
            replace_file(path, save(tensors, {"levels": _LEVELS.dump_json(levels).decode()}))
        self._known[levels[0].block] = levels

    def levels(self, block: int) -> tuple[Levels, ...]:
        return self._known[block]

    def writers(self, levels: Levels) -> Writers:
        with safe_open(self._path(levels.block), framework="pt") as file:
            count = sum(name.startswith(f"{levels.part}.") for name in file.keys())  # noqa: SIM118 - not a dict
            return tuple(file.get_tensor(f"{levels.part}.{number}") for number in range(count))

    def drop(self) -> None:
        """Remove the files; finished measurements need them no more."""
        for path in self._folder.glob("block-*.safetensors") if is_main_process() else ():
            path.unlink(missing_ok=True)

    def _path(self, block: int) -> Path:
        return self._folder / f"block-{block}.safetensors"


def _levels_in(path: Path) -> tuple[Levels, ...] | None:
    """Read the levels of a block; None if there is no file, or a damaged one."""
    if not path.exists():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            return _LEVELS.validate_json(file.metadata()["levels"])
    except (SafetensorError, OSError, ValueError, KeyError, TypeError):
        return None
