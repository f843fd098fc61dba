"""Merge experts into the ones that stay, block after block, each measured on the model as merged so far.

REAM: Jha et al. 2026, "REAM: Merging Improves Pruning of Experts in LLMs" (arXiv:2604.04356). In each block the experts
of highest saliency stay (REAP's S_j); every other expert is merged into one of them that is similar in what it writes
and in what the router gives it. Channels of merged experts are matched first, because an expert computes the same in
any order of its channels. Weights are averaged by saliency or frequency, and rows of the router go with the experts
that go.

Departures from the paper: similarities take all tokens of a sample at once, weighted by router probabilities, not token
by token; router logits are centred for each token; channels are matched by their weights, not also by activations.

Legend: E = experts, K = those that stay, F = channels of an expert, M = tokens, d = width of the residual stream.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment

from secateur.calibration.ridge import Ridge
from secateur.calibration.routing import Routed, RoutingSums, add_routed, expert_outputs, routed_step
from secateur.calibration.statistics import device_with_float64
from secateur.calibration.store import StateStore
from secateur.calibration.walk import Batch
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.models.anatomy import saved_tensors
from secateur.models.decoder import Decoder
from secateur.models.experts import experts_module, experts_path, without_experts
from secateur.models.widths import block_widths
from secateur.plan.experts import Grouping
from secateur.run_options import DEFAULTS, RunOptions
from secateur.surgery.assembly import Tensors
from secateur.surgery.experts.refit import rebuild_experts
from secateur.surgery.experts.removal import ExpertAssembly, best_experts
from secateur.surgery.width.coupling import Couplings, couplings_of

_SAMPLE = 2048
"""Tokens for which what all experts would write is compared."""
_CHUNK_BYTES = 64 << 20
_TINY = 1e-30

Groups = dict[int, tuple[int, ...]]
"""For each expert that stays, those that are merged into it."""


@dataclass(frozen=True)
class MergeRule:
    """How experts are merged.

    Attributes:
        saliency: the score of each expert of a block, (E,), by which they stay.
        average: what the weights of merged experts are averaged by, (E,).
        grouping: which are merged; see `grouped`.
        group: largest number of experts merged into one, with itself.
        align: match the channels of merged experts before averaging.
    """

    saliency: Callable[[RoutingSums], torch.Tensor]
    average: Callable[[RoutingSums], torch.Tensor]
    grouping: Grouping
    group: int
    align: bool = True


class SimilaritySums:
    """Sums over tokens of products of what two experts write, and of the router's logits for them, (E, E) float64."""

    def __init__(self, experts: int) -> None:
        """Start at zero."""
        self.written, self.logits = torch.zeros(2, experts, experts, dtype=torch.float64)

    def update(self, routed: Routed, experts: Any, limit: int) -> None:
        """Add at most `limit` tokens, evenly spaced; `experts` is the module that computes what they write."""
        home, count = device_with_float64(routed.states.device), len(self.logits)
        some = torch.linspace(0, len(routed.states) - 1, min(limit, len(routed.states))).round().long()
        numbers = torch.arange(count, device=routed.states.device)
        for part in some.split(max(1, _CHUNK_BYTES // (4 * routed.states.shape[1] * count))):
            places = part.to(routed.states.device)
            logits_ME = routed.logits[places].float()
            centred_ME = (logits_ME - logits_ME.mean(dim=1, keepdim=True)).to(home).double()
            self.logits += (centred_ME.T @ centred_ME).cpu()
            states, weights_ME = routed.states[places].repeat_interleave(count, dim=0), logits_ME.softmax(dim=1)
            if routed.factors is not None:  # the router's weight is in what enters
                states = states * logits_ME.sigmoid().flatten()[:, None].to(states)
                weights_ME = torch.ones_like(weights_ME)
            written = expert_outputs(experts, states, numbers.repeat(len(part))).float()
            gated_MEd = written.view(len(part), count, -1) * weights_ME[..., None]
            flat_EX = gated_MEd.transpose(0, 1).flatten(1)
            self.written += (flat_EX @ flat_EX.T).cpu().double()

    def result(self) -> torch.Tensor:
        """Return the mean of the two cosines between any two experts, (E, E)."""
        return (_cosines(self.written) + _cosines(self.logits)) / 2


def _cosines(products: torch.Tensor) -> torch.Tensor:
    lengths = products.diagonal().clamp_min(_TINY).sqrt()
    return products / torch.outer(lengths, lengths)


def grouped(saliency: torch.Tensor, similarity: torch.Tensor, stay: Sequence[int], rule: MergeRule) -> Groups:
    """Assign every expert that goes to one that stays.

    `nearest`: the most salient first, each goes to the most similar one whose group has room. `salient`, the paper's:
    those that stay, the most salient first, fill their groups with the most similar ones left, so that most keep their
    own weights.

    Args:
        saliency: of each expert, (E,).
        similarity: between any two, (E, E).
        stay: the experts that stay.
        rule: how they are grouped, and how large a group may be.

    Raises:
        InputError: the groups have no room for all.
    """
    order = torch.argsort(saliency, descending=True, stable=True).tolist()
    gone = [expert for expert in order if expert not in stay]
    groups: dict[int, list[int]] = {expert: [] for expert in order if expert in stay}
    if len(gone) > len(groups) * (rule.group - 1):
        raise InputError(
            f"group={rule.group}: {len(stay)} groups of that size have no room for {len(saliency)} experts; raise it."
        )
    if rule.grouping == "salient":
        for own, members in groups.items():
            nearest = sorted(gone, key=lambda expert, own=own: -float(similarity[own, expert]))  # type: ignore[misc]
            members += nearest[: rule.group - 1]
            gone = [expert for expert in gone if expert not in members]
    else:
        for expert in gone:
            free = [own for own, members in groups.items() if len(members) < rule.group - 1]
            groups[max(free, key=lambda own, expert=expert: float(similarity[own, expert]))].append(  # type: ignore[misc]
                expert
            )
    return {own: tuple(members) for own, members in sorted(groups.items())}


def merged(
    tensors: Tensors, couplings: Couplings, groups: Groups, weight: torch.Tensor, *, align: bool = True
) -> Tensors:
    """Return the tensors of the experts that stay, (K, …), each averaged with those merged into it.

    Args:
        tensors: those of the module with the experts, (E, …).
        couplings: which slices of them belong to which channel.
        groups: what is merged into which.
        weight: of each expert in the average, (E,); if those of a group are 0, its members count the same.
        align: match channels first: of all orders of an expert's channels, take the one that brings its weights closest
            to those it is merged into, in squared distance.
    """
    found: dict[str, list[torch.Tensor]] = {name: [] for name in tensors}
    for own, members in groups.items():
        weights = weight[[own, *members]].double()
        weights = weights / weights.sum() if float(weights.sum()) > 0 else torch.full_like(weights, 1 / len(weights))
        sums = {name: float(weights[0]) * tensor[own].float() for name, tensor in tensors.items()}
        features = channel_features(tensors, couplings, own) if members and align else None
        for member, share in zip(members, weights[1:].tolist(), strict=True):
            order = None if features is None else _matching(features, channel_features(tensors, couplings, member))
            for name, tensor in tensors.items():
                sums[name] += share * _in_order(tensor[member].float(), name, couplings, order)
        for name, total in sums.items():
            found[name].append(total)
    return {name: torch.stack(parts).to(tensors[name].dtype) for name, parts in found.items()}


def channel_features(tensors: Tensors, couplings: Couplings, expert: int) -> torch.Tensor:
    """Return all weights of each channel of an expert in a row, (F, n) float32."""
    rows = []
    for name, tensor in tensors.items():
        if name in couplings:
            axis, places = _slices(couplings, name)
            slices = tensor[expert].movedim(axis, 0)[places.flatten().to(tensor.device)]
            rows.append(slices.reshape(len(places), -1).float())
    return torch.cat(rows, dim=1)


def _slices(couplings: Couplings, name: str) -> tuple[int, torch.Tensor]:
    """Return the axis, in the tensor of one expert, that runs over channels, and the slices of each, (F, n)."""
    coupling = couplings[name]
    assert coupling.axis is not None
    assert coupling.expert is None, "the tensor holds all experts"
    return coupling.axis - 1, torch.argsort(coupling.labels, stable=True).view(int(coupling.labels.max()) + 1, -1)


def _matching(own: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """Return for each channel of one expert the channel of the other that matches it, (F,)."""
    _, matched = linear_sum_assignment((own @ other.T).cpu().numpy(), maximize=True)
    return torch.from_numpy(matched)


def _in_order(tensor: torch.Tensor, name: str, couplings: Couplings, order: torch.Tensor | None) -> torch.Tensor:
    """Return the tensor of an expert with its channels in another order; as it is where it has none."""
    if order is None or name not in couplings:
        return tensor
    axis, places = _slices(couplings, name)
    source = torch.empty(places.numel(), dtype=torch.int64)
    source[places.flatten()] = places[order].flatten()
    return tensor.index_select(axis, source.to(tensor.device))


@dataclass(frozen=True)
class Merged:
    """A model whose experts were merged.

    Attributes:
        decoder: the model.
        groups: for each block with experts, what was merged into which.
        fits: how output projections were refitted, as in `Rebuilt`.
    """

    decoder: Decoder
    groups: dict[int, Groups]
    fits: list[dict[str, Any]]


@torch.no_grad()
def merge_experts(
    decoder: Decoder,
    windows: Windows,
    keep: int,
    rule: MergeRule,
    *,
    ridge: Ridge | None = None,
    options: RunOptions = DEFAULTS,
) -> Merged:
    """Merge the experts of every block until `keep` are left in each; the given model stays as it is.

    Args:
        decoder: the model.
        windows: calibration windows.
        keep: number of experts each block keeps.
        rule: how they are merged.
        ridge: of the refit of what they write, as in `rebuild_experts`; None refits nothing.
        options: batch size and progress.

    Raises:
        InputError: a model with that many experts is impossible, or the groups have no room for all.
        ModelError: the model has no experts that can be removed, or none that can be refitted.
        NumericsError: NaN or infinity on the way.
    """
    groups = dict[int, Groups]()

    def merge(new: ExpertAssembly, index: int, batches: Sequence[Batch], store: StateStore) -> None:
        groups[index] = _merge_block(decoder, new, index, (keep, rule), batches, store)

    found = rebuild_experts(decoder, windows, keep, merge, ridge=ridge, options=options)
    return Merged(found.decoder, groups, found.fits)


def _merge_block(
    decoder: Decoder,
    new: ExpertAssembly,
    index: int,
    wanted: tuple[int, MergeRule],
    batches: Sequence[Batch],
    store: StateStore,
) -> Groups:
    """Measure block `index`, its weights present, and set that of the new model."""
    keep, rule = wanted
    block, family = decoder.block_list[index], decoder.anatomy.family
    count = block_widths(decoder, index).experts
    sums, similarity = RoutingSums(count), SimilaritySums(count)
    for batch in batches:
        _, routed = routed_step(decoder, index, batch, store.get(batch.index))
        add_routed(sums, routed, decoder, index)
        for one in routed:
            similarity.update(one, experts_module(block, family), -(-_SAMPLE // len(batches)))
    sums.require_finite(index)
    saliency = rule.saliency(sums)
    stay = best_experts(saliency, keep, new.mixture.groups)
    groups = grouped(saliency, similarity.result(), stay, rule)
    tensors = {name: tensor.detach() for name, tensor in saved_tensors(block)}
    path = f"{experts_path(block, family)}."
    couplings = couplings_of(block, family, block_widths(decoder, index))
    inside = {name: tensor for name, tensor in tensors.items() if name.startswith(path)}
    rest = without_experts({n: t for n, t in tensors.items() if n not in inside}, new.axes(index), stay)
    new.put(index, rest | merged(inside, couplings, groups, rule.average(sums), align=rule.align))
    return groups
