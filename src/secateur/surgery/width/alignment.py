"""Bring what a block computes before its MLP is refitted back to what the dense model computes there.

Below a cut the states are off, and all that is computed from them. Each linear map of a block is therefore fitted to
what it gives in the dense model, given what it reads in the pruned one, in the order in which they run:

* What a branch reads is x, the output of its norm; in the dense model it is x̂. The map A minimises
  Σ w ‖x̂ − x − A x‖² + λ ‖A‖², and each projection W that reads x becomes W (I + A).
* What attention writes: its output projection is refitted (`repair.py`) to what brings the state after it back.
* What the MLP writes: that is the repair of its width.

λ is chosen on held-out windows; where no fit is better there, nothing changes. Weights stay as many as they were.

Source: Li et al. 2025, "GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration", fit quantised layers
to what the dense ones give on the inputs of the dense model. Sharing one map among all that read the same, and choosing
λ on held-out text, is not theirs. Legend: x, x̂ (d,) for each token; W (out, d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from secateur.calibration.folds import Folds
from secateur.calibration.inputs import InputSums
from secateur.calibration.ridge import Ridge
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch, step
from secateur.models.anatomy import find, residual_factor
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.surgery.width.inputs import Goal, as_saved, holding, of_dense, writer_of, writes_stream
from secateur.surgery.width.repair import choose_fit, described

Edits = Mapping[str, torch.Tensor]
_LINEAR = (nn.Linear, Conv1D)
_SAME = 1e-3
"""Relative difference up to which two states are the same."""


class _Enough(Exception):
    """Ends a block at its second norm."""


def of_middle(batch: Batch) -> tuple[int, str]:
    """Return the key of the states of the dense model between attention and MLP."""
    return batch.index, "middle"


@dataclass
class Alignment:
    """One block whose projections are aligned; its weights are loaded.

    Attributes:
        decoder: the dense model.
        index: the block.
        batches: the calibration windows.
        store: holds the states that enter the block, of the pruned and of the dense model.
        folds: how tokens count, and which evaluate a fit.
        ridge: of the fits.
        fits: for each branch whose inputs were fitted, the ridge and the errors on held-out windows.
    """

    decoder: Decoder
    index: int
    batches: Sequence[Batch]
    store: StateStore
    folds: Folds
    ridge: Ridge
    fits: list[dict[str, Any]] = field(default_factory=list)
    _readers: dict[str, list[str]] = field(default_factory=dict)
    _turn_of_attention: torch.Tensor | None = None

    @classmethod
    def where_possible(
        cls,
        decoder: Decoder,
        index: int,
        batches: Sequence[Batch],
        store: StateStore,
        folds: Folds,
        ridge: Ridge,
    ) -> Alignment | None:
        """Return what aligns a block; None where its branches are built in another way."""
        if not cls.possible(decoder, index):
            return None
        found = cls(decoder, index, batches, store, folds, ridge)
        return found if found.writes_middle(batches[0]) else None

    @classmethod
    def possible(cls, decoder: Decoder, index: int) -> bool:
        """Return whether attention and then the MLP of a block each read a norm and write the residual stream."""
        family, block = decoder.anatomy.family, decoder.block_list[index]
        norms = [find(block, name) for name in family.norms]
        if len(norms) != 2 or None in norms or decoder.anatomy.parallel or family.streams > 1:
            return False
        widths = block_widths(decoder, index)
        if not writes_stream(decoder) or not widths.heads or not widths.channels:
            return False
        writer = find(block, writer_of(decoder, index, "heads"))
        shape = writer.weight.shape if type(writer) in _LINEAR else ()
        return widths.heads * widths.head_size in shape

    def fit_attention_inputs(self) -> None:
        """Fit what attention reads, while the states that enter the block of the dense model are known."""
        norm = self._norm(self._norms[0])
        self._turn_of_attention = self._turn(
            "attention inputs", norm, of_dense, lambda batch: self.store.get(batch.index)
        )

    def attention_inputs(self) -> Edits:
        """Return the projections that attention reads with, once `watching` has seen the dense block run."""
        turn = self._turn_of_attention
        return {} if turn is None else self._turned(self._norms[0], turn)

    @contextmanager
    def watching(self, batch: Batch) -> Iterator[None]:
        """Keep the state between attention and MLP while the block of the dense model runs on a batch."""
        second = self._norm(self._norms[1])

        def keep(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            self.store.put(of_middle(batch), args[0].detach().view(self._shape_of(batch)))

        with ExitStack() as stack:
            stack.callback(second.register_forward_pre_hook(keep).remove)
            if not self._readers:
                self._readers = stack.enter_context(self._finding_readers())
            yield

    def after_attention(self, batch: Batch) -> torch.Tensor:
        """Run attention alone and return the state after it."""
        found: list[torch.Tensor] = []

        def stop(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found.append(args[0])
            raise _Enough

        hook = self._norm(self._norms[1]).register_forward_pre_hook(stop)
        try:
            step(self.decoder, self.index, batch, self.store.get(batch.index))
        except _Enough:
            pass
        finally:
            hook.remove()
        return found[0].view(self._shape_of(batch))

    def writes_middle(self, batch: Batch) -> bool:
        """Return whether the state after attention is the one before it, and what its output projection writes."""
        written: list[torch.Tensor] = []
        writer = find(self._block, writer_of(self.decoder, self.index, "heads"))
        hook = writer.register_forward_hook(lambda _module, _args, output: written.append(output))
        try:
            middle = self.after_attention(batch)
        finally:
            hook.remove()
        factor = residual_factor(self.decoder.config, self.decoder.anatomy.family)
        expected = self.store.get(batch.index) + factor * written[0].view(middle.shape)
        return bool((middle - expected).norm() <= _SAME * middle.norm())

    def mlp_inputs(self, edits: Edits) -> Edits:
        """Fit what the MLP reads, with these parameters of attention in place."""
        norm = self._norms[1]
        with holding(self._block, edits):
            turn = self._turn("MLP inputs", self._norm(norm), of_middle, self.after_attention)
        return self._turned(norm, turn)

    def attention_goal(self, *, then_mlp: bool) -> Goal:
        """Return what attention is to write for: the state after it, which leaves the block where no MLP follows."""
        return Goal("heads", of_middle if then_mlp else of_dense)

    def forget(self) -> None:
        """Drop the states between attention and MLP."""
        for batch in self.batches:
            self.store.drop(of_middle(batch))

    @property
    def _block(self) -> nn.Module:
        return self.decoder.block_list[self.index]

    @property
    def _norms(self) -> tuple[str, ...]:
        return self.decoder.anatomy.family.norms

    def _shape_of(self, batch: Batch) -> tuple[int, ...]:
        """Return the shape of its states; some blocks put all tokens of a batch in one row."""
        return (*batch.tokens.shape, self.decoder.hidden_size)

    def _norm(self, name: str) -> nn.Module:
        found: nn.Module = find(self._block, name)
        return found

    @contextmanager
    def _finding_readers(self) -> Iterator[dict[str, list[str]]]:
        """Fill a table of the linear maps that read each norm while the block runs."""
        outputs: dict[str, torch.Tensor] = {}
        found: dict[str, list[str]] = {name: [] for name in self._norms}

        def read(name: str, state: torch.Tensor) -> None:
            for norm, output in outputs.items():
                if state.data_ptr() == output.data_ptr() and state.numel() == output.numel():
                    found[norm].append(name)

        with ExitStack() as stack:
            for norm in self._norms:
                hook = self._norm(norm).register_forward_hook(
                    lambda _module, _args, output, norm=norm: outputs.__setitem__(norm, output)
                )
                stack.callback(hook.remove)
            for name, module in self._block.named_modules():
                if type(module) in _LINEAR:
                    hook = module.register_forward_pre_hook(lambda _module, args, name=name: read(name, args[0]))
                    stack.callback(hook.remove)
            yield found

    def _turn(
        self,
        part: str,
        norm: nn.Module,
        dense: Callable[[Batch], tuple[int, str]],
        own: Callable[[Batch], torch.Tensor],
    ) -> torch.Tensor:
        """Return I + A for what a norm gives, (d, d), float64."""
        sums, first = InputSums(self.decoder.hidden_size, self.decoder.device), 0
        for batch in self.batches:
            read, wanted = (norm(state).flatten(0, 1) for state in (own(batch), self.store.get(dense(batch))))
            folds = self.folds.slice(first, len(batch.tokens))
            window = torch.arange(len(batch.tokens)).repeat_interleave(batch.tokens.shape[1])
            if batch.mask is not None:
                real = batch.mask.flatten()
                read, wanted, window = read[real], wanted[real], window[real.cpu()]
            sums.update(read, window, folds.weight[window], folds.held_out[window], wanted - read)
            first += len(batch.tokens)
        sums.require_finite(f"the {part} of block {self.index}")
        same = torch.eye(len(sums.total), dtype=torch.float64, device=sums.total.device)
        every = torch.ones(len(same), dtype=torch.bool, device=same.device)
        fit = choose_fit(same, sums, every, repair=True, bias=False, ridge=self.ridge)
        self.fits.append({"block": self.index, "part": part, **described([fit])})
        return fit.applied(same, sums, every)[0]

    def _turned(self, norm: str, turn: torch.Tensor) -> Edits:
        """Return the projections that read a norm, as they read what comes close to that of the dense model."""
        found = {}
        for name in self._readers[norm]:
            module = find(self._block, name)
            weight = module.weight.to(turn)
            turned = turn.T @ weight if isinstance(module, Conv1D) else weight @ turn
            found[f"{name}.weight"] = as_saved(self.decoder, turned, module.weight)
        return found


def advance_dense(
    decoder: Decoder, index: int, batches: Sequence[Batch], store: StateStore, aligned: Alignment | None
) -> None:
    """Run block `index` on the states of the dense model, if the store follows them; alignment watches."""
    for batch in batches:
        if of_dense(batch) in store:
            with nullcontext() if aligned is None else aligned.watching(batch):
                state = step(decoder, index, batch, store.get(of_dense(batch)))
            store.put(of_dense(batch), state)
