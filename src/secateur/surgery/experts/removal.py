"""A model with fewer experts in its blocks, of the same architecture, built block by block."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from secateur.errors import InputError
from secateur.models.anatomy import saved_tensors
from secateur.models.decoder import Decoder
from secateur.models.experts import Mixture, config_with_experts, expert_axes, mixture_of, without_experts
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.assembly import Assembly, Tensors


def require_stock_count(mixture: Mixture, keep: int) -> None:
    """Refuse a number of experts that the configuration cannot name, or that the router cannot choose from.

    Raises:
        InputError: with the reason.
    """
    if keep < mixture.chosen:
        raise InputError(f"{keep} experts: each token is sent to {mixture.chosen}, so at least that many must stay.")
    if keep % mixture.multiple():
        raise InputError(f"{keep} experts: their {mixture.groups} groups must keep as many each.")
    if keep < mixture.fewest():
        raise InputError(
            f"{keep} experts: the router takes {mixture.chosen} from {mixture.chosen_groups} of {mixture.groups} "
            f"groups, so at least {mixture.fewest()} must stay."
        )


def best_experts(scores: torch.Tensor, keep: int, groups: int = 1) -> tuple[int, ...]:
    """Return the `keep` experts of highest score, as many of each group of neighbours, in order.

    Of equal scores the lower number stays.
    """
    size = len(scores) // groups
    order = torch.argsort(scores.view(groups, size), dim=1, descending=True, stable=True)[:, : keep // groups]
    return tuple(sorted((order + size * torch.arange(groups)[:, None]).flatten().tolist()))


class ExpertAssembly:
    """A model with fewer experts under construction, block by block.

    Attributes:
        decoder: the model so far; its block `index` has weights between `block` and `finish`.
    """

    def __init__(self, dense: Decoder, keep: int) -> None:
        """Start empty.

        Raises:
            InputError: a model with that many experts in each block is impossible.
            ModelError: the model has no experts that can be removed.
        """
        self.mixture = mixture_of(dense)
        require_stock_count(self.mixture, keep)
        family = dense.anatomy.family
        config = config_with_experts(dense.module.config, family, keep)
        self._dense, self._assembly = dense, Assembly(dense, config, family)
        self._seen: list[Any] = [keep]

    @property
    def decoder(self) -> Decoder:
        """The model so far."""
        return self._assembly.decoder

    def axes(self, index: int) -> dict[str, int]:
        """Return the axis that runs over the experts of each tensor of block `index` of the dense model."""
        sizes = self.mixture.sizes[index]
        if sizes is None:
            return {}
        return expert_axes(self._dense.block_list[index], self._dense.anatomy.family, sizes.count)

    def put(self, index: int, tensors: Tensors) -> None:
        """Set tensors of block `index` of the new model."""
        self._assembly.put(self._assembly.block_path(index), tensors)

    def keep(self, index: int, kept: Sequence[int]) -> None:
        """Set block `index` to that of the dense model, its weights present, with only these experts."""
        block = self._dense.block_list[index]
        tensors = {name: tensor.detach() for name, tensor in saved_tensors(block)}
        self.put(index, without_experts(tensors, self.axes(index), tuple(kept)))

    def finish(self, index: int) -> None:
        """Finish block `index`; that of a skeleton goes to disk."""
        named = self._assembly.layer(index).named_parameters()
        self._seen.append([round(float(one.sum(dtype=torch.float32)), 4) for _, one in named])
        self._assembly.finish(index)

    def result(self) -> Decoder:
        """Add what is outside the blocks, and return the model."""
        self._assembly.keep_outer()
        return self._assembly.result({"experts": self._seen})


@torch.no_grad()
def drop_experts(decoder: Decoder, kept: Sequence[Sequence[int]], *, options: RunOptions = DEFAULTS) -> Decoder:
    """Return a model whose blocks keep only these experts; the given one stays as it is.

    Args:
        decoder: the model.
        kept: the experts that each block keeps, in order; empty for a block whose MLP is dense.
        options: progress.

    Raises:
        InputError: a model with that many experts in each block is impossible, or groups would differ in size.
        ModelError: the model has no experts that can be removed.
    """
    new = ExpertAssembly(decoder, max(map(len, kept)))
    require_even_groups(new.mixture, kept)
    for index in options.progress(range(decoder.block_count), "dropping experts block by block", decoder.block_count):
        with decoder.block(index):
            new.keep(index, kept[index])
            new.finish(index)
    return new.result()


def require_even_groups(mixture: Mixture, kept: Sequence[Sequence[int]]) -> None:
    """Refuse experts of which more are in one group of the router than in another.

    Raises:
        InputError: naming the block.
    """
    for block, (own, sizes) in enumerate(zip(kept, mixture.sizes, strict=True)):
        if sizes is None:
            continue
        size = sizes.count // mixture.groups
        counts = {sum(expert // size == group for expert in own) for group in range(mixture.groups)}
        if len(counts) > 1:
            raise InputError(
                f"the plan keeps more experts of one group than of another in block {block}; the router has "
                f"{mixture.groups} groups of {size} neighbours, which must stay equal."
            )
