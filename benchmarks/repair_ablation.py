"""What closed-form repair is worth on text of other kinds than it was fitted on, one choice changed at a time.

A Llama loses channels of all its MLPs, block by block on what is cut already. Unlike the package this runs each block
once, in bfloat16 with float32 Gram matrices, so that a variant takes minutes; the arithmetic is the package's.

    python benchmarks/repair_ablation.py MODEL OWN.npy WIKITEXT.txt PROSE_CALIBRATION PROSE_HELD_OUT [NAME …]

OWN.npy holds windows that the model generated (W, 512); the two folders hold manual pages as text, disjoint; code is
the standard library. WikiText is never calibrated on. One line per variant goes to `results/repair_ablation.jsonl`.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from common import CODE, keep
from transformers import AutoModelForCausalLM, AutoTokenizer

from secateur.calibration.folds import EVERY
from secateur.data.texts import open_texts
from secateur.scores.unit_scores import best_units, cheapest_to_lose

LENGTH = 512
EVALUATED = 8
RIDGES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0, 10.0)


@dataclass(frozen=True)
class Variant:
    """How channels are chosen and the others refitted.

    Attributes:
        score: `obs` (greedy) or `wanda-sp`.
        choice_ridge: of the greedy choice, in mean diagonals.
        weigh: a token counts as much as any other (`none`), or 1 / ‖residual stream‖² (`residual`).
        ridge: of the repair; None makes none, `auto` takes the best on every fourth window of each source.
        target: what the cut model's MLP wrote (`cut`), or what brings its states back to the dense ones (`dense`).
        windows: of calibration.
        own: share of them that the model generated; prose and code share the rest.
        removed: share of the channels that goes.
    """

    score: str = "obs"
    choice_ridge: float = 1e-3
    weigh: str = "residual"
    ridge: float | str | None = "auto"
    target: str = "cut"
    windows: int = 32
    own: float = 1 / 3
    removed: float = 0.25


VARIANTS = {
    "default": Variant(),
    "before": Variant(weigh="none", ridge=1e-3),
    "no-repair": Variant(ridge=None),
    "choice-ridge-0.3": Variant(choice_ridge=0.3),
    "unweighted": Variant(weigh="none"),
    "dense-target": Variant(target="dense"),
    "64-windows-half-own": Variant(windows=64, own=0.5),
    "96-windows": Variant(windows=96),
    "wanda-sp": Variant(score="wanda-sp"),
    "wanda-sp-no-repair": Variant(score="wanda-sp", ridge=None),
} | {
    f"{method}-{share:.0%}": Variant(score=method, removed=share)
    for method in ("obs", "wanda-sp")
    for share in (1 / 6, 1 / 3, 1 / 2)
}


class Sums:
    """Weighted sums of what enters the projection, for windows that are fitted and for those held out."""

    def __init__(self, inputs: int, outputs: int) -> None:
        """Start at zero."""
        self.gram, self.cross = torch.zeros(2, inputs, inputs), torch.zeros(2, outputs, inputs)

    def add(self, fold: int, x: torch.Tensor, missing: torch.Tensor | None, weight: torch.Tensor) -> None:
        """Add tokens: inputs (M, n), what the output lacks (M, out), and their weights (M,)."""
        self.gram[fold].addmm_((x * weight[:, None]).T, x)
        if missing is not None:
            self.cross[fold].addmm_((missing * weight[:, None]).T, x)

    def both(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return both sums over all windows, float64."""
        return self.gram.double().sum(dim=0), self.cross.double().sum(dim=0)


def chosen(variant: Variant, weight: torch.Tensor, gram: torch.Tensor) -> torch.Tensor:
    """Mark the channels that stay, (n,) bool."""
    units = torch.arange(len(gram))[None, :, None]
    count = round((1 - variant.removed) * len(gram))
    if variant.score == "obs":
        return cheapest_to_lose(weight, gram, units, count, batch=len(gram) // 128, ridge=variant.choice_ridge)[0]
    return best_units((weight.abs().sum(dim=0) * gram.diagonal().sqrt())[None], count)[0]


def refitted(variant: Variant, weight: torch.Tensor, sums: Sums, stay: torch.Tensor) -> tuple[torch.Tensor, Any]:
    """Return the projection with zeros where channels went, and the ridge that was taken."""
    kept, gone = stay.nonzero().flatten(), (~stay).nonzero().flatten()
    result = torch.zeros_like(weight)
    result[:, kept] = weight[:, kept]
    gram, cross = sums.both()
    ridge = best_ridge(weight, sums, kept, gone) if variant.ridge == "auto" else variant.ridge
    if ridge is not None:
        left = gram[kept][:, kept]
        left.diagonal().add_(ridge * gram.diagonal().mean())
        right = weight[:, gone] @ gram[gone][:, kept] + cross[:, kept]
        result[:, kept] += torch.cholesky_solve(right.T, torch.linalg.cholesky(left)).T
    return result, ridge


def best_ridge(weight: torch.Tensor, sums: Sums, kept: torch.Tensor, gone: torch.Tensor) -> float | None:
    """Return the ridge of the least error on windows held out; None where no repair is better."""
    (gram, held), (cross, held_cross) = sums.gram.double(), sums.cross.double()
    values, vectors = torch.linalg.eigh(gram[kept][:, kept])
    turned = (weight[:, gone] @ gram[gone][:, kept] + cross[:, kept]) @ vectors
    wanted = (weight[:, gone] @ held[gone][:, kept] + held_cross[:, kept]) @ vectors
    linear, square = (turned * wanted).sum(dim=0), (turned.T @ turned) * (vectors.T @ held[kept][:, kept] @ vectors)
    gains: dict[float | None, float] = {None: 0.0}
    for ridge in RIDGES:
        shrunk = 1 / (values.clamp_min(0) + ridge * gram.diagonal().mean())
        gains[ridge] = float(shrunk @ square @ shrunk - 2 * shrunk @ linear)
    return min(gains, key=lambda one: gains[one])


@torch.no_grad()
def cut(model: Any, dense: list[torch.Tensor], sources: list[torch.Tensor], variant: Variant) -> list[Any]:
    """Cut all blocks of the model, whose dense projections are given; gives the ridges."""
    for layer, weight in zip(model.model.layers, dense, strict=True):
        layer.mlp.down_proj.weight.data.copy_(weight)
    tokens = torch.cat(sources)
    held_out = torch.cat([torch.arange(len(one)) % EVERY == EVERY - 1 for one in sources]).long()
    of_source = torch.cat([torch.full((len(one),), 1 / len(one)) for one in sources])
    states = model.model.embed_tokens(tokens)
    reference = states.clone() if variant.target == "dense" else None
    rotary = model.model.rotary_emb(states[:1], torch.arange(LENGTH)[None])
    ridges = []
    for layer, weight in zip(model.model.layers, dense, strict=True):
        seen: list[torch.Tensor] = []
        hook = layer.mlp.down_proj.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0][0]))
        sums, inputs = Sums(*reversed(weight.shape)), []
        for window in range(len(tokens)):
            if reference is not None:
                reference[window] = layer(reference[window][None], position_embeddings=rotary)[0]
                seen.clear()
            leaves = layer(states[window][None], position_embeddings=rotary)[0].float()
            inputs.append(seen.pop())
            x = inputs[-1].float()
            aim = leaves if reference is None else reference[window].float()
            length = aim.square().mean(dim=1) if variant.weigh == "residual" else torch.ones(LENGTH)
            missing = None if reference is None else aim - leaves
            sums.add(int(held_out[window]), x, missing, of_source[window] / length)
            states[window] = (leaves - x @ weight.float().T).to(states.dtype)
        hook.remove()
        wide = weight.double()
        result, ridge = refitted(variant, wide, sums, chosen(variant, wide, sums.both()[0]))
        layer.mlp.down_proj.weight.data.copy_(result)
        for window, x in enumerate(inputs):
            states[window] += x @ layer.mlp.down_proj.weight.data.T
        ridges.append(ridge)
    return ridges


@torch.no_grad()
def perplexities(model: Any, texts: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Return the perplexity on windows of each source."""
    found = {}
    for name, windows in texts.items():
        losses = [
            torch.nn.functional.cross_entropy(model(one).logits[:, :-1].float().flatten(0, 1), one[:, 1:].flatten())
            for one in windows.split(1)
        ]
        found[name] = math.exp(float(torch.stack(losses).mean()))
    return found


def spread(windows: torch.Tensor) -> torch.Tensor:
    """Take `EVALUATED` windows, evenly spaced."""
    return windows[torch.linspace(0, len(windows) - 1, EVALUATED).round().long()]


def calibration(
    variant: Variant, own: torch.Tensor, opened: Callable[[str, int, str], torch.Tensor], prose: str
) -> list[torch.Tensor]:
    """Return the windows of each source."""
    others = round(variant.windows * (1 - variant.own) / 2)
    parts = [own[: variant.windows - 2 * others]]
    return [*parts, *(opened(source, others, "calibration") for source in (prose, CODE))]


def main(folder: str, own: str, wikitext: str, prose: str, prose_held_out: str, names: Iterable[str]) -> None:
    """Measure the variants of these names, or all."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    dense = [layer.mlp.down_proj.weight.data.clone() for layer in model.model.layers]

    def opened(source: str, count: int, split: Any) -> torch.Tensor:
        return open_texts(source, tokenizer, windows=count, seq_len=LENGTH, split=split).tokens

    named = {"wikitext": wikitext, "prose": prose_held_out, "code": CODE}
    texts = {name: spread(opened(source, 64, "held-out")) for name, source in named.items()}
    before = perplexities(model, texts)
    for name in names or VARIANTS:
        variant, started = VARIANTS[name], time.perf_counter()
        ridges = cut(model, dense, calibration(variant, torch.from_numpy(np.load(own)), opened, prose), variant)
        seconds = time.perf_counter() - started
        after = perplexities(model, texts)
        ratios = {source: after[source] / before[source] for source in texts}
        keep(
            "repair_ablation",
            {"variant": name, "model": folder, **asdict(variant)},
            {
                "dense": {source: round(value, 3) for source, value in before.items()},
                "perplexity": {source: round(value, 3) for source, value in after.items()},
                "ratios": {source: round(value, 4) for source, value in ratios.items()},
                "geometric_mean": round(math.prod(ratios.values()) ** (1 / len(ratios)), 4),
                "ridges": ridges,
                "seconds": round(seconds, 1),
            },
        )


if __name__ == "__main__":
    main(*sys.argv[1:6], sys.argv[6:])
