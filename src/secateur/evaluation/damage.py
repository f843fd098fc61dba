"""What a cut has cost, in one sentence: a few held-out windows and continuations of both models, after every `prune`.

It is no evaluation (`secateur eval`), but it tells a model that needs healing from one that is beyond use.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from secateur.data.texts import windows_by_source
from secateur.data.windows import Windows
from secateur.evaluation.gate import Gate, accuracies_in
from secateur.evaluation.metrics.perplexity import mean_over_sources, perplexity, ratios_by_source
from secateur.evaluation.results import Result
from secateur.models.decoder import Decoder
from secateur.run_options import DEFAULTS, RunOptions

RUINED = 3.0
"""Perplexity ÷ the dense model's, on the worst source, from which a model counts as ruined."""
LEAST_VARIED = 0.35
"""Share of distinct three-token sequences below which a continuation repeats itself."""

_PREDICTS = "it predicts text far worse than before"
_ADVICE = "Remove less, use another method (`secateur compare` tries several), or heal it before use (`secateur heal`)."
_WINDOWS = 4
_PROMPT, _WRITTEN = 32, 48


@dataclass(frozen=True)
class Damage:
    """A pruned model next to the dense one.

    Attributes:
        ratios: perplexity ÷ that of the dense model, by source of held-out text.
        prompts: number of texts that both models continued, greedily; 0 if they do not fit into memory.
        repeating: number of continuations in which the pruned model repeats itself and the dense one does not.
    """

    ratios: dict[str, float]
    prompts: int = 0
    repeating: int = 0

    @property
    def repeats(self) -> bool:
        """Whether most continuations repeat themselves that did not before."""
        return 2 * self.repeating > self.prompts

    @property
    def ruined(self) -> bool:
        """Whether the model is of no use as it is."""
        return max(self.ratios.values()) > RUINED or self.repeats

    def sentence(self) -> str:
        """Say it in words."""
        listed = ", ".join(f"{source} ×{ratio:.2f}" for source, ratio in self.ratios.items())
        mean = mean_over_sources(self.ratios.values())
        found = f"perplexity on a little held-out text: ×{mean:.2f} of the dense model's ({listed})"
        if not self.ruined:
            return f"{found}."
        what = []
        if max(self.ratios.values()) > RUINED:
            what.append(_PREDICTS)
        if self.repeats:
            what.append(f"it repeats itself in {self.repeating} of {self.prompts} continuations")
        return f"{found}. This cut has ruined the model: {' and '.join(what)}. {_ADVICE}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self) | {"ruined": self.ruined}


def beyond_use(results: Iterable[Result]) -> str | None:
    """Return a sentence if an evaluation next to the dense model shows that a model is of no use; None if it does not.

    It is of no use if its perplexity on a source is more than `RUINED` times the dense model's, or if it can do none of
    the probes it was asked (`Gate.able`) and the dense model can.
    """
    found = list(results)
    worst = {source: ratio for source, ratio in ratios_by_source(found).items() if ratio > RUINED}
    listed = ", ".join(f"×{ratio:.2f} of the dense perplexity on {source}" for source, ratio in worst.items())
    what = [f"{_PREDICTS} ({listed})"] if worst else []
    after, before = (accuracies_in(one for one in found if one.role == role) for role in ("model", "against"))
    asked = Gate(tuple(name for name in after if name in before))
    if asked.able(before) and not asked.able(after):
        listed = ", ".join(f"{name} {after[name]:.2f}, dense {before[name]:.2f}" for name in asked.able(before))
        what.append(f"it does no probe clearly better than guessing ({listed})")
    return f"This model is beyond use as it is: {' and '.join(what)}. {_ADVICE}" if what else None


def damage_of(dense: Decoder, pruned: Decoder, *, options: RunOptions = DEFAULTS) -> Damage | None:
    """Compare a pruned model with the dense one on a little held-out text; None without a tokenizer.

    Args:
        dense: the model it was made from; both read block by block if they are skeletons.
        pruned: the result.
        options: windows per batch, progress.

    Raises:
        NumericsError: NaN or infinity on the way.
    """
    if dense.tokenizer is None:
        return None
    sources = windows_by_source(dense, None, windows=_WINDOWS, options=options)
    ratios = {one.source: perplexity(pruned, one, options) / perplexity(dense, one, options) for one in sources}
    if dense.by_blocks or pruned.by_blocks or sources[0].seq_len < _PROMPT + _WRITTEN:
        return Damage(ratios)
    before, after = ([_varied(one) for one in _written(model, sources)] for model in (dense, pruned))
    repeating = sum(was >= LEAST_VARIED > now for was, now in zip(before, after, strict=True))
    return Damage(ratios, len(after), repeating)


@torch.inference_mode()
def _written(model: Decoder, sources: Sequence[Windows]) -> list[list[int]]:
    """Return the greedy continuation of the beginning of each window."""
    prompts = torch.cat([one.tokens[:, :_PROMPT] for one in sources]).to(model.device)
    ends = model.tokenizer.eos_token_id if model.tokenizer is not None else None
    found = model.module.generate(
        input_ids=prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=_WRITTEN,
        do_sample=False,
        pad_token_id=ends or 0,
    )
    return [[token for token in row if token != ends] for row in found[:, _PROMPT:].tolist()]


def _varied(tokens: Sequence[int]) -> float:
    """Return the share of distinct three-token sequences; 1 for a text that is too short to repeat itself."""
    threes = list(zip(tokens, tokens[1:], tokens[2:], strict=False))
    return len(set(threes)) / len(threes) if len(threes) > _WRITTEN // 2 else 1.0
