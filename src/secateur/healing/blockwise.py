"""Block-wise distillation: blocks that pruning changed, or that follow a gap, learn the dense model's hidden states.

Blocks are trained in order, one at a time. The input of a block comes from the healed blocks below it, so it also
corrects their remaining error. The target of an edited block is the input of the next remaining block in the dense
model, since it replaces all blocks up to there; that of an unchanged block after a gap is the output of its original.
Both models may be skeletons: one block of each is in memory at a time, and hidden states are in memory-mapped files.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from secateur.calibration.reading_points import centred
from secateur.calibration.walk import open_store
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.depth.blocks import with_block_tensors
from secateur.training.data import WindowData, split_off_validation
from secateur.training.pairs import BlockNetwork, PairData, PairRegression, Rows, StoredPairs
from secateur.training.settings import Outcome, TrainingSettings
from secateur.training.trainer import TrainingRun, train


@dataclass(frozen=True)
class Lesson:
    """Training target of one block.

    Attributes:
        block: its number in the pruned model.
        depth: its target is the input of dense block `depth` (after the last one: X^L).
    """

    block: int
    depth: int


def lessons(pruned: Decoder, dense: Decoder, kept: tuple[int, ...]) -> tuple[Lesson, ...]:
    """Find the blocks to train, by comparing their weights with those of the dense model.

    Args:
        pruned: the pruned model.
        dense: the model it was made from.
        kept: for each block of the pruned model its number in the dense one.
    """
    found = []
    follows_edit = False
    for block, origin in enumerate(kept):
        following = kept[block + 1] if block + 1 < len(kept) else dense.block_count
        gap = origin > (kept[block - 1] + 1 if block else 0)
        edited = _differs(pruned, block, dense, origin)
        if edited:
            found.append(Lesson(block, following))
        elif gap and not follows_edit:
            found.append(Lesson(block, origin + 1))
        follows_edit = edited
    return tuple(found)


def _differs(pruned: Decoder, block: int, dense: Decoder, origin: int) -> bool:
    with pruned.block(block) as left, dense.block(origin) as right:
        ours, theirs = dict(left.named_parameters()), dict(right.named_parameters())
        return ours.keys() != theirs.keys() or any(
            one.shape != theirs[name].shape or not torch.equal(one, theirs[name].to(one.device, one.dtype))
            for name, one in ours.items()
        )


def heal_blocks(
    pruned: Decoder,
    dense: Decoder,
    kept: tuple[int, ...],
    windows: Windows,
    settings: TrainingSettings,
    *,
    recipe: dict[str, Any],
    options: RunOptions = DEFAULTS,
) -> tuple[Decoder, dict[int, Outcome]]:
    """Train every block that pruning affected on the dense model's states; return the healed model and each outcome.

    Args:
        pruned: the pruned model; it is not changed.
        dense: the model it was made from, with the same coordinates of the residual stream.
        kept: for each block of the pruned model its number in the dense one.
        windows: training windows; some are held out.
        settings: of each block's training.
        recipe: data that identify this run.
        options: seed of the order of the windows, batch size of the walks; each block gets a folder within the work
            folder.

    Raises:
        InputError: the models have different widths, or no block was affected.
    """
    if pruned.hidden_size != dense.hidden_size or pruned.changes_basis:
        raise InputError(
            f"{pruned.source}: its hidden states are in other coordinates than those of {dense.source}, so its blocks "
            "cannot learn them; heal with lora, full or distill."
        )
    todo = {lesson.block: lesson.depth for lesson in lessons(pruned, dense, kept)}
    if not todo:
        raise InputError(f"{pruned.source}: every block is as in {dense.source}, none follows a gap: nothing to heal.")
    numbers, held_back = split_off_validation(windows)
    pairs = StoredPairs(len(windows), windows.seq_len, dense.state_size)
    folded = pruned.anatomy.family is not dense.anatomy.family
    outcomes: dict[int, Outcome] = {}
    with open_store(pruned) as states, open_store(dense) as targets:
        student = Rows.start(pruned, windows, states, options.batch_size)
        teacher = Rows.start(dense, windows, targets, options.batch_size)
        depths = _advancing(teacher)
        for block in options.progress(range(max(todo) + 1), "healing block by block", max(todo) + 1):
            if block in todo:
                next(depth for depth in depths if depth == todo[block])
                student.write(pairs.entering)
                teacher.write(pairs.leaving, (lambda state: centred(dense, state)) if folded else None)
                network = BlockNetwork.copy_of(student.decoder, [block])
                with student.decoder.outer(head=False):
                    outcomes[block] = train(
                        PairRegression(student.decoder, (block, block), network),
                        PairData(WindowData(windows, numbers), pairs, numbers),
                        PairData(WindowData(windows, held_back), pairs, held_back),
                        settings,
                        TrainingRun(recipe=recipe | {"block": block}, what=f"block {block}"),
                        device=pruned.device,
                        options=options.within(f"block-{block}"),
                    )
                student.decoder = _with_block(student.decoder, block, network.blocks[0])
            student.through(block)
    return student.decoder, outcomes


def _advancing(rows: Rows) -> Iterator[int]:
    """Run windows through one block after the other; return the depth they have reached."""
    yield 0
    for index in range(rows.decoder.block_count):
        rows.through(index)
        yield index + 1


def _with_block(decoder: Decoder, index: int, block: nn.Module) -> Decoder:
    """Return the decoder with this block replaced, its weights rounded to the dtype to be saved."""
    stored = {name: one.detach().to(decoder.saved_dtype) for name, one in block.named_parameters()}
    edit = {"healed": [index, [float(one.double().sum()) for one in stored.values()]]}
    return with_block_tensors(
        decoder, [(index, {name: one.to(decoder.module.dtype) for name, one in stored.items()})], edit
    )
