"""Pruning methods written straight from their papers, for Llama models: what others' tools do, without our additions.

No repair, no screening, no cached prefixes, the whole model in memory, every candidate run in full. Each function takes
a model, calibration tokens (windows, positions) and the share of all parameters that is to go, and returns the pruned
model; the one given is left as it is.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cosine_similarity, cross_entropy

_AT_ONCE = 2


def parameters(model: nn.Module) -> int:
    """Count parameters, tied ones once."""
    return sum(one.numel() for one in model.parameters())


@torch.no_grad()
def mean_loss(model: Any, tokens: torch.Tensor) -> float:
    """Return the mean next-token loss of full forward passes, in nats."""
    total = 0.0
    for some in tokens.split(_AT_ONCE):
        logits = model(input_ids=some, use_cache=False).logits[:, :-1]
        total += float(cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten(), reduction="sum"))
    return total / tokens[:, 1:].numel()


def without_blocks(model: Any, gone: Sequence[int]) -> Any:
    """Return a copy without some blocks; `gone` may be empty."""
    shorter = copy.deepcopy(model)
    shorter.model.layers = nn.ModuleList(one for index, one in enumerate(shorter.model.layers) if index not in gone)
    shorter.config.num_hidden_layers = len(shorter.model.layers)
    return shorter


def blocks_for(model: Any, share: float) -> int:
    """Return how many blocks come closest to a share of the parameters."""
    return max(1, round(share * parameters(model) / parameters(model.model.layers[0])))


@torch.no_grad()
def shortgpt(model: Any, tokens: torch.Tensor, share: float) -> Any:
    """Remove the blocks of lowest influence 1 − cos(input, output). Men et al. 2024, section 3."""
    influence = [0.0] * len(model.model.layers)

    def watch(index: int) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...], output: Any) -> None:
            after = output[0] if isinstance(output, tuple) else output
            influence[index] += float((1 - cosine_similarity(args[0], after, dim=-1)).sum())

        return add

    hooks = [layer.register_forward_hook(watch(index)) for index, layer in enumerate(model.model.layers)]
    for some in tokens.split(_AT_ONCE):
        model.model(input_ids=some, use_cache=False)
    for hook in hooks:
        hook.remove()
    order = sorted(range(len(influence)), key=influence.__getitem__)
    return without_blocks(model, order[: blocks_for(model, share)])


def sleb(model: Any, tokens: torch.Tensor, share: float) -> Any:
    """Remove the block whose absence costs least, again and again. Song et al. 2024, algorithm 1; the ends stay."""
    left = list(range(len(model.model.layers)))
    layers = model.model.layers
    for _ in range(blocks_for(model, share)):
        losses = {}
        for candidate in left[1:-1]:
            model.model.layers = nn.ModuleList(layers[one] for one in left if one != candidate)
            losses[candidate] = mean_loss(model, tokens)
        left.remove(min(losses, key=losses.__getitem__))
    model.model.layers = layers
    return without_blocks(model, [one for one in range(len(layers)) if one not in left])


def narrow(layer: Any, channels: torch.Tensor, groups: torch.Tensor, head_size: int) -> None:
    """Keep channels and key/value groups (with their query heads) of a block, bool each."""
    mlp, attention = layer.mlp, layer.self_attn
    heads = groups.repeat_interleave(attention.q_proj.out_features // head_size // len(groups))
    queries, keys = (one.repeat_interleave(head_size) for one in (heads, groups))
    for projection, rows in (
        (mlp.gate_proj, channels),
        (mlp.up_proj, channels),
        (attention.q_proj, queries),
        (attention.k_proj, keys),
        (attention.v_proj, keys),
    ):
        projection.weight = nn.Parameter(projection.weight[rows].clone())
        projection.out_features = int(rows.sum())
    for projection, columns in ((mlp.down_proj, channels), (attention.o_proj, queries)):
        projection.weight = nn.Parameter(projection.weight[:, columns].clone())
        projection.in_features = int(columns.sum())


def _sizes(model: Any) -> tuple[int, int, int, int]:
    """Return channels, key/value groups, the size of a head, and the parameters of a group."""
    config = model.config
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    queries = config.num_attention_heads // config.num_key_value_heads
    return (
        config.intermediate_size,
        config.num_key_value_heads,
        head_size,
        (2 * queries + 2) * head_size * config.hidden_size,
    )


def _all(count: int) -> torch.Tensor:
    return torch.ones(count, dtype=torch.bool)


def _best(scores: torch.Tensor, keep: int) -> torch.Tensor:
    chosen = torch.zeros(len(scores), dtype=torch.bool)
    chosen[scores.argsort(descending=True)[:keep]] = True
    return chosen


@torch.no_grad()
def optipfair(model: Any, _: torch.Tensor, share: float) -> Any:
    """Keep the channels whose gate and up rows span the widest range, as many in every block; reads no text.

    The default of optipfair, whose documentation calls it maximum absolute weight: max + |min| of both rows.
    """
    smaller = copy.deepcopy(model)
    channels, groups, head_size, _ = _sizes(model)
    layers = smaller.model.layers
    keep = channels - round(share * parameters(model) / (3 * model.config.hidden_size * len(layers)))
    for layer in layers:
        rows = (layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight)
        score = sum(one.amax(dim=1) + one.amin(dim=1).abs() for one in rows)
        narrow(layer, _best(score, keep), _all(groups), head_size)
    return smaller


def llm_pruner(model: Any, tokens: torch.Tensor, share: float) -> Any:
    """Keep the coupled groups of largest Σ |w ∂L/∂w|; the first four and last two blocks stay. Ma et al. 2023."""
    smaller = copy.deepcopy(model).requires_grad_(True)
    channels, groups, head_size, of_group = _sizes(model)
    wanted = share * parameters(model)
    for some in tokens.split(_AT_ONCE):
        logits = smaller(input_ids=some, use_cache=False).logits[:, :-1]
        cross_entropy(logits.flatten(0, 1).float(), some[:, 1:].flatten()).backward()
    ends = (4, 2) if len(smaller.model.layers) > 12 else (1, 1)
    layers = smaller.model.layers[ends[0] : len(smaller.model.layers) - ends[1]]
    inside = channels * 3 * model.config.hidden_size + groups * of_group
    gone = int(wanted / len(layers) / inside * groups)
    keep = channels - round((wanted / len(layers) - gone * of_group) / (3 * model.config.hidden_size))
    with torch.no_grad():
        for layer in layers:
            mlp, attention = layer.mlp, layer.self_attn
            of_weight = {one: (one.weight * one.weight.grad).abs() for one in layer.modules() if _has_gradient(one)}
            score = of_weight[mlp.gate_proj].sum(1) + of_weight[mlp.up_proj].sum(1) + of_weight[mlp.down_proj].sum(0)
            coupled = [of_weight[one].sum(1) for one in (attention.q_proj, attention.k_proj, attention.v_proj)]
            coupled.append(of_weight[attention.o_proj].sum(0))
            of_groups = sum(one.view(groups, -1).sum(1) for one in coupled)
            narrow(layer, _best(score, max(1, keep)), _best(of_groups, groups - gone), head_size)
    smaller.zero_grad()
    return smaller


def _has_gradient(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) and module.weight.grad is not None


@contextmanager
def _inputs_summed(modules: Sequence[nn.Linear]) -> Iterator[list[torch.Tensor]]:
    """Sum up 1, x and x² over the tokens that enter each module, (3, inputs) float64."""
    sums = [torch.zeros(3, one.in_features, dtype=torch.float64) for one in modules]

    def watch(into: torch.Tensor) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            rows = args[0].flatten(0, 1).double()
            into.add_(torch.stack((torch.full_like(rows[0], len(rows)), rows.sum(0), rows.square().sum(0))))

        return add

    hooks = [one.register_forward_pre_hook(watch(into)) for one, into in zip(modules, sums, strict=True)]
    yield sums
    for hook in hooks:
        hook.remove()


@torch.no_grad()
def flap(model: Any, tokens: torch.Tensor, share: float) -> Any:
    """Remove what fluctuates least, by one threshold for all blocks, and add its mean as a bias. An et al. 2024."""
    smaller = copy.deepcopy(model)
    _, groups, head_size, of_group = _sizes(model)
    layers = list(smaller.model.layers)
    writers = [one for layer in layers for one in (layer.self_attn.o_proj, layer.mlp.down_proj)]
    with _inputs_summed(writers) as sums:
        for some in tokens.split(_AT_ONCE):
            smaller.model(input_ids=some, use_cache=False)
    means = [total / count for count, total, _ in sums]
    scores, costs = [], []
    for number, (writer, mean, (count, _, squares)) in enumerate(zip(writers, means, sums, strict=True)):
        is_mlp = number % 2 == 1
        fluctuation = (squares / count - mean.square()) * writer.weight.double().square().sum(0)
        score = fluctuation if is_mlp else fluctuation.view(groups, -1).mean(1)
        scores.append((score - score.mean()) / score.std())
        costs += [3 * model.config.hidden_size if is_mlp else of_group] * len(score)
    order = torch.cat(scores).argsort()
    gone = order[torch.tensor(costs)[order].cumsum(0) <= share * parameters(model)]
    stay = _all(len(order))
    stay[gone] = False
    kept = stay.split([len(one) for one in scores])
    for index, layer in enumerate(layers):
        both = slice(2 * index, 2 * index + 2)
        of_groups, of_channels = map(_not_empty, kept[both])
        inputs = (of_groups.repeat_interleave(len(means[2 * index]) // groups), of_channels)
        for writer, mean, left in zip(writers[both], means[both], inputs, strict=True):
            shift = writer.weight[:, ~left].double() @ mean[~left]
            writer.bias = nn.Parameter(shift.to(writer.weight.dtype))
        narrow(layer, of_channels, of_groups, head_size)
    return smaller


def _not_empty(kept: torch.Tensor) -> torch.Tensor:
    """Keep one unit at least."""
    kept = kept.clone()
    kept[0] |= not bool(kept.any())
    return kept


class Sliced(nn.Module):
    """A Llama whose residual stream has fewer dimensions, in another basis before and after every branch."""

    def __init__(self, model: Any, width: int) -> None:
        """Fold the norms into what reads after them; the weights are sliced by `slicegpt`."""
        super().__init__()
        self.embedding = model.model.embed_tokens
        self.layers = model.model.layers
        self.head = nn.Linear(width, model.config.vocab_size, bias=False)
        self.rotary, self.eps, self.dense = model.model.rotary_emb, model.config.rms_norm_eps, model.config.hidden_size
        self.shortcuts = nn.ParameterList()

    def norm(self, states: torch.Tensor) -> torch.Tensor:
        """Divide by the root mean square over the dense width."""
        return states * (states.square().sum(-1, keepdim=True) / self.dense + self.eps).rsqrt()

    def branch(self, index: int, states: torch.Tensor) -> torch.Tensor:
        """Return what a branch writes: attention for even numbers, the MLP for odd ones."""
        layer = self.layers[index // 2]
        if index % 2:
            return layer.mlp(self.norm(states))
        positions = torch.arange(states.shape[1])[None]
        return layer.self_attn(
            self.norm(states), position_embeddings=self.rotary(states, positions), attention_mask=None
        )[0]

    def forward(self, input_ids: torch.Tensor, use_cache: bool = False) -> Any:
        """Return an object with the logits."""
        states = self.embedding(input_ids)
        for index, shortcut in enumerate(self.shortcuts):
            states = states @ shortcut + self.branch(index, states)
        return SimpleNamespace(logits=self.head(self.norm(states)))


@torch.no_grad()
def slicegpt(model: Any, tokens: torch.Tensor, share: float) -> Any:
    """Rotate every reading point to its principal directions and keep the first. Ashkboos et al. 2024, section 3."""
    dense = copy.deepcopy(model)
    width = _sliced_width(model, share)
    head = model.lm_head.weight * model.model.norm.weight
    sliced = Sliced(dense, width)
    states = [dense.model.embed_tokens(some) for some in tokens.split(_AT_ONCE)]
    basis = _principal(states)[:, :width]
    sliced.embedding = nn.Embedding.from_pretrained(dense.model.embed_tokens.weight @ basis, freeze=False)
    states = [one @ basis for one in states]
    for index in range(2 * len(sliced.layers)):
        layer = sliced.layers[index // 2]
        norm = layer.post_attention_layernorm if index % 2 else layer.input_layernorm
        mlp, attention = layer.mlp, layer.self_attn
        readers = (mlp.gate_proj, mlp.up_proj) if index % 2 else (attention.q_proj, attention.k_proj, attention.v_proj)
        for reader in readers:
            reader.weight = nn.Parameter(reader.weight * norm.weight @ basis)
        written = [sliced.branch(index, one) for one in states]
        after = _principal([one @ basis.T + more for one, more in zip(states, written, strict=True)])[:, :width]
        writer = mlp.down_proj if index % 2 else attention.o_proj
        writer.weight = nn.Parameter(after.T @ writer.weight)
        sliced.shortcuts.append(nn.Parameter(basis.T @ after))
        states = [one @ (basis.T @ after) + more @ after for one, more in zip(states, written, strict=True)]
        basis = after
        norm.weight = nn.Parameter(torch.empty(0))
    sliced.head.weight = nn.Parameter(head @ basis)
    return sliced


def _principal(states: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the eigenvectors of the states' second moments, largest first."""
    total = sum(one.flatten(0, 1).double().T @ one.flatten(0, 1).double() for one in states)
    return torch.linalg.eigh(total).eigenvectors.flip(-1).to(states[0].dtype)


def _sliced_width(model: Any, share: float) -> int:
    """Return the width, a multiple of 8, that comes closest to a share, with shortcuts and an own head counted."""
    config = model.config
    layers, dense = len(model.model.layers), config.hidden_size
    inside = sum(one.weight.numel() for one in model.model.layers.modules() if isinstance(one, nn.Linear)) / dense
    wanted = (1 - share) * parameters(model)

    def size(width: int) -> float:
        return width * (2 * config.vocab_size + inside) + 2 * layers * width**2

    return min(range(8, dense + 1, 8), key=lambda width: math.fabs(size(width) - wanted))


METHODS: dict[str, Callable[[Any, torch.Tensor, float], Any]] = {
    "shortgpt": shortgpt,
    "sleb": sleb,
    "slicegpt": slicegpt,
    "flap": flap,
    "llm-pruner": llm_pruner,
    "optipfair": optipfair,
}
