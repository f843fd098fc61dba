"""What low-rank stand-ins for removed branches are worth, beside MLPs that are refitted anyway.

    python benchmarks/stand_ins.py MODEL WIKITEXT.txt [SHARE …]

`branches` chooses what goes. Then, block after block: a removed branch gets a pair of matrices of some rank that reads
what it read, fitted by ridge regression to what it wrote in the dense model plus what the states lack, cut to its rank
along the principal directions of what it predicts; ridge and rank by the error on held-out windows. Above the first cut
every MLP is refitted to the dense states, as `branches` does. The last case is `obs-width` with `allocation=global` at
as many parameters as with pairs. One line per case goes to `results/stand_ins.jsonl`. For Llamas in memory.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from common import LENGTH, keep, texts_that_judge
from torch import nn
from transformers.utils import logging

import secateur
from secateur.calibration.folds import folds_of
from secateur.calibration.inputs import Moments
from secateur.calibration.ridge import GRID, strength
from secateur.calibration.walk import open_store, step, stored_start, through_block
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.errors import SecateurWarning
from secateur.evaluation.metrics.perplexity import perplexity
from secateur.methods.apply_widths import BrainSurgeon
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS
from secateur.scores.removal import Branch
from secateur.surgery.width.coupling import Part
from secateur.surgery.width.inputs import holding, measure_inputs, of_dense
from secateur.surgery.width.pruning import Refit, refitted
from secateur.surgery.width.target import dense_widths

NONE = (0,)
RANKS = (0, 8, 16, 32, 64)
ENOUGH = 0.95
"""The smallest rank with this share of the best gain is taken."""
REFIT = Refit(target="dense")
Pair = tuple[torch.Tensor, torch.Tensor]


def main(model: str, wikitext: str, *shares: str) -> None:
    """Measure the cases."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.simplefilter("ignore", SecateurWarning)
    bench = Bench(model, wikitext)
    for share in shares or ("0.15", "0.25"):
        for name, ranks in (("none", NONE), ("low-rank", RANKS)):
            left = bench.branches(float(share), name, ranks)
        bench.widths(float(share), left)


class Bench:
    """A model with the texts that it is calibrated on and judged by."""

    def __init__(self, model: str, wikitext: str) -> None:
        """Read them, and measure the dense model."""
        self._name, self._decoder = model.rpartition("/")[2], secateur.open_model(model)
        self._texts = texts_that_judge(self._decoder, wikitext)
        self._windows = windows_for(self._decoder, None, windows=32, seq_len=LENGTH)
        self._dense = self._read(self._decoder)

    def branches(self, share: float, name: str, ranks: Sequence[int]) -> int:
        """Remove branches with pairs of these ranks in their place; return how many parameters are left."""
        decoder = self._decoder
        plan = secateur.make_plan(decoder, method="branches", texts=self._windows, remove=share)
        gone = removed(decoder, plan.steps[0].widths)
        with ExitStack() as edits:
            pairs = stand_in(decoder, self._windows, gone, ranks, edits)
            after = self._read(decoder)
        left = plan.parameters_after + sum(first.numel() + second.numel() for first, second in pairs.values())
        used = [len(first) for first, _ in pairs.values()]
        self._keep(share, name, left, after, {"branches": len(gone), "ranks": used})
        return left

    def widths(self, share: float, parameters: int) -> None:
        """Give every block its own widths instead, at as many parameters."""
        plan = secateur.make_plan(
            self._decoder,
            method="obs-width",
            texts=self._windows,
            settings={"allocation": "global"},
            target_params=parameters,
        )
        pruned = secateur.prune(self._decoder, plan, texts=self._windows)
        self._keep(share, "widths instead", pruned.parameter_count, self._read(pruned), {"branches": 0, "ranks": [0]})

    def _read(self, decoder: Decoder) -> dict[str, float]:
        return {source: perplexity(decoder, one, DEFAULTS) for source, one in self._texts.items()}

    def _keep(self, share: float, name: str, left: int, after: dict[str, float], found: dict[str, Any]) -> None:
        ratios = {source: after[source] / self._dense[source] for source in after}
        found |= {
            "removed": round(1 - left / self._decoder.parameter_count, 4),
            "ratios": {source: round(value, 4) for source, value in ratios.items()},
            "geometric_mean": round(math.prod(ratios.values()) ** (1 / len(ratios)), 4),
        }
        keep("stand_ins", {"model": self._name, "remove": share, "stand_ins": name}, found)


def removed(decoder: Decoder, widths: Sequence[Any]) -> list[Branch]:
    """Return the branches that a plan removes, in order."""
    found: list[Branch] = []
    for block, (own, dense) in enumerate(zip(widths, dense_widths(decoder), strict=True)):
        found += [(block, "heads")] if dense.groups > own.groups == 0 else []
        found += [(block, "channels")] if dense.channels > own.channels == 0 else []
    return found


@torch.no_grad()
def stand_in(
    decoder: Decoder, windows: Windows, gone: Sequence[Branch], ranks: Sequence[int], edits: ExitStack
) -> dict[Branch, Pair]:
    """Replace branches, and refit the MLPs above the first; everything is undone when `edits` is closed."""
    folds, pairs, first = folds_of(windows), dict[Branch, Pair](), min(block for block, _ in gone)
    widths = dense_widths(decoder)
    with open_store(decoder) as store:
        batches = stored_start(decoder, windows, store, DEFAULTS.batch_size)
        for batch in batches:
            store.put(of_dense(batch), store.get(batch.index))
        for index in range(decoder.block_count):
            parts = [part for block, part in gone if block == index]
            wrote = {}
            for batch in batches:
                with captured(decoder, index) as dense:
                    store.put(of_dense(batch), step(decoder, index, batch, store.get(of_dense(batch))))
                wrote[batch.index] = {part: dense[part][0] + dense[part][2] for part in parts}
            for part in parts:
                sums = [Moments.zero(decoder.hidden_size, decoder.device) for _ in range(2)]
                place = 0
                for batch in batches:
                    own, place = folds.slice(place, len(batch.tokens)), place + len(batch.tokens)
                    with captured(decoder, index) as now:
                        step(decoder, index, batch, store.get(batch.index))
                    entered, read, _ = now[part]
                    left = wrote[batch.index][part]
                    weight = own.weight[:, None].float() / left.square().mean(dim=-1)
                    for held, into in zip((False, True), sums, strict=True):
                        rows = own.held_out == held
                        if bool(rows.any()):
                            into.add(*(one[rows].flatten(0, 1).float() for one in (read, weight, left - entered)))
                pairs[index, part] = fitted_pair(sums[0], sums[1], ranks)
                edits.enter_context(replaced(decoder, index, part, pairs[index, part]))
            if index >= first and "channels" not in parts:
                inputs = measure_inputs(decoder, index, ["channels"], batches, store, folds)["channels"]
                found = refitted(decoder, index, "channels", inputs, widths[index], BrainSurgeon(), refit=REFIT)
                edits.enter_context(holding(decoder.block_list[index], found.parameters))
            through_block(decoder, index, batches, store)
    return pairs


def fitted_pair(fitted: Moments, held_out: Moments, ranks: Sequence[int]) -> Pair:
    """Return A (r, d) and B (d, r) of x ↦ B A x, ridge and rank by the error on held-out tokens."""
    assert fitted.cross is not None
    assert held_out.cross is not None
    found: list[tuple[float, int, Pair]] = []
    for ridge in GRID:
        gram = fitted.gram.clone()
        gram.diagonal().add_(strength(fitted.gram, ridge))
        full = torch.cholesky_solve(fitted.cross, torch.linalg.cholesky(gram))
        directions = torch.linalg.eigh(full.T @ fitted.gram @ full).eigenvectors.flip(1)
        for rank in ranks:
            first, second = full @ directions[:, :rank], directions[:, :rank]
            gain = torch.sum((first.T @ held_out.gram @ first).diagonal()) - 2 * torch.sum(
                (held_out.cross @ second) * first
            )
            found.append((float(gain), rank, (first.T.float().contiguous(), second.float().contiguous())))
    best = min(gain for gain, _, _ in found)
    return min((one for one in found if one[0] <= ENOUGH * best), key=lambda one: (one[1], one[0]))[2]


def _modules(decoder: Decoder, index: int, part: Part) -> tuple[nn.Module, nn.Module]:
    """Return the norm before a branch of a Llama, and the branch."""
    block: Any = decoder.block_list[index]
    return (block.input_layernorm, block.self_attn) if part == "heads" else (block.post_attention_layernorm, block.mlp)


@contextmanager
def captured(decoder: Decoder, index: int) -> Iterator[dict[Part, list[torch.Tensor]]]:
    """Collect for each branch of a block the stream that enters it, what it reads, and what it writes."""
    found: dict[Part, list[torch.Tensor]] = {"heads": [], "channels": []}
    with ExitStack() as hooks:
        for part, into in found.items():
            norm, branch = _modules(decoder, index, part)
            handles = (
                norm.register_forward_hook(lambda _, given, out, into=into: into.extend((given[0], out))),
                branch.register_forward_hook(lambda _, __, out, into=into: into.append(_first(out))),
            )
            for handle in handles:
                hooks.callback(handle.remove)
        yield found


@contextmanager
def replaced(decoder: Decoder, index: int, part: Part, pair: Pair) -> Iterator[None]:
    """Let a pair of matrices write what a branch wrote."""
    norm, branch = _modules(decoder, index, part)
    read: list[torch.Tensor] = []
    first, second = pair

    def write(_: nn.Module, __: Any, out: Any) -> Any:
        last = read.pop()
        written = last @ first.T.to(last) @ second.T.to(last)
        return (written, *out[1:]) if isinstance(out, tuple) else written

    handles = (norm.register_forward_hook(lambda _, __, out: read.append(out)), branch.register_forward_hook(write))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _first(out: Any) -> torch.Tensor:
    found: torch.Tensor = out[0] if isinstance(out, tuple) else out
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
