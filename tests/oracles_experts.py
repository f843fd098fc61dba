"""What mixtures of experts compute, written out token by token in float64, and scores of their experts."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import nn


@torch.no_grad()
def entering_mixtures(module: nn.Module, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return what enters the mixture of each block, (windows, positions, d)."""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        layer.mlp.register_forward_pre_hook(lambda _, args, number=number: found.__setitem__(number, args[0]))
        for number, layer in enumerate(module.model.layers)
        if hasattr(layer.mlp, "experts")
    ]
    module(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


@torch.no_grad()
def outputs(module: nn.Module, tokens: torch.Tensor) -> dict[int, torch.Tensor]:
    """Return what leaves each block, (windows, positions, d)."""
    found: dict[int, torch.Tensor] = {}
    hooks = [
        layer.register_forward_hook(lambda _, __, output, number=number: found.__setitem__(number, output))
        for number, layer in enumerate(module.model.layers)
    ]
    module(input_ids=tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def expert(mlp: nn.Module, number: int, x: torch.Tensor) -> torch.Tensor:
    """Return what one expert writes for one token."""
    both = mlp.experts.gate_up_proj[number] @ x
    gate, up = both[: len(both) // 2], both[len(both) // 2 :]
    return mlp.experts.down_proj[number] @ (gate * torch.sigmoid(gate) * up)


def routing(mlp: nn.Module, x: torch.Tensor) -> tuple[list[int], list[float]]:
    """Return the experts of one token and their shares, which sum to 1."""
    probabilities = torch.softmax(mlp.gate.weight @ x, dim=0)
    chosen = sorted(range(len(probabilities)), key=lambda one: -float(probabilities[one]))[: mlp.gate.top_k]
    total = sum(float(probabilities[one]) for one in chosen)
    return chosen, [float(probabilities[one]) / total for one in chosen]


@torch.no_grad()
def saliency(mlp: nn.Module, states: torch.Tensor) -> dict[str, list[float]]:
    """Return S_j, |X_j| and Σ ‖f_j‖ of each expert over these tokens, (M, d)."""
    count = len(mlp.gate.weight)
    gated, load, norms = [0.0] * count, [0.0] * count, [0.0] * count
    for x in states:
        for one, share in zip(*routing(mlp, x), strict=True):
            length = float(sum(value**2 for value in expert(mlp, one, x).tolist()) ** 0.5)
            gated[one] += share * length
            load[one] += 1
            norms[one] += length
    means = [total / seen if seen else 0.0 for total, seen in zip(gated, load, strict=True)]
    return {"reap": means, "expert-frequency": load, "expert-activation": norms}


@torch.no_grad()
def similarity(mlp: nn.Module, states: torch.Tensor) -> torch.Tensor:
    """Return the mean of two cosines between experts: of all they write, weighted, and of their centred logits."""
    count = len(mlp.gate.weight)
    written, logits = [[] for _ in range(count)], [[] for _ in range(count)]
    for x in states:
        own = mlp.gate.weight @ x
        probabilities = torch.softmax(own, dim=0)
        for one in range(count):
            written[one].append(probabilities[one] * expert(mlp, one, x))
            logits[one].append(own[one] - own.mean())
    result = torch.zeros(count, count, dtype=torch.float64)
    for a, b in itertools.product(range(count), repeat=2):
        outputs = torch.cosine_similarity(torch.cat(written[a]), torch.cat(written[b]), dim=0)
        result[a, b] = (outputs + torch.cosine_similarity(torch.stack(logits[a]), torch.stack(logits[b]), dim=0)) / 2
    return result


def merged_expert(
    gate_up: torch.Tensor, down: torch.Tensor, members: Sequence[int], weights: Sequence[float]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the average of experts with the channels of each in the order closest to the first, of all orders."""
    channels = down.shape[2]
    total = sum(weights)
    results = [torch.zeros_like(gate_up[0]), torch.zeros_like(down[0])]
    own = members[0]
    for member, weight in zip(members, weights, strict=True):
        best, least = None, float("inf")
        for order in itertools.permutations(range(channels)):
            rows = [*order, *(channels + one for one in order)]
            apart = (gate_up[member][rows] - gate_up[own]).square().sum()
            apart = float(apart + (down[member][:, list(order)] - down[own]).square().sum())
            if apart < least:
                best, least = (gate_up[member][rows], down[member][:, list(order)]), apart
        for result, tensor in zip(results, best, strict=True):
            result += weight / total * tensor
    return results[0], results[1]
