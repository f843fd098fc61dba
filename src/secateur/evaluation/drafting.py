"""A pruned model as the draft model of the dense one: how many of its tokens are accepted, and how much faster that is.

Assisted generation: the draft writes some tokens, the dense model checks them in one pass and keeps those it would have
written itself, so that the text stays its own (Leviathan, Kalman, Matias 2023, "Fast Inference from Transformers via
Speculative Decoding"; greedy here). Both ways of writing alternate, as in `speed.py`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, PreTrainedModel

from secateur.errors import InputError, ModelError, first_line
from secateur.evaluation.results import Result, result_of
from secateur.evaluation.speed import Timing
from secateur.models.decoder import Decoder
from secateur.run_options import RunOptions


@dataclass(frozen=True)
class Draft:
    """One text written with a draft model, and without.

    Attributes:
        tokens: number of new tokens.
        checks: passes of the dense model, each of which keeps what it agrees with and adds a token.
        proposed: tokens that the draft wrote.
        same: whether both ways gave the same tokens.
        seconds: with the draft.
        alone: seconds without it.
    """

    tokens: int
    checks: int
    proposed: int
    same: bool
    seconds: float
    alone: float

    @property
    def accepted(self) -> int:
        """Number of the draft's tokens that were kept."""
        return self.tokens - self.checks


def measure_drafting(
    draft: Decoder, dense: Decoder, prompts: torch.Tensor, timing: Timing, options: RunOptions
) -> list[Result]:
    """Let the dense model continue prompts with a draft model and without.

    Args:
        draft: the pruned model.
        dense: the model whose text is written; same vocabulary.
        prompts: beginnings of held-out texts, (W, T) int64, one at a time.
        timing: tokens written after each, tokens drafted before each check, rounds.
        options: progress.

    Returns:
        `draft_acceptance` (share of drafted tokens that are kept), `tokens_per_check`, and
        `assisted_tokens_per_second` beside the dense model's own speed, medians over rounds; `ratio` within rounds.

    Raises:
        InputError: more tokens than a model has positions.
        ModelError: transformers cannot generate with this pair (the message says why).
    """
    longest = prompts.shape[1] + timing.new_tokens
    for one in (draft, dense):
        if one.max_positions is not None and longest > one.max_positions:
            raise InputError(f"{longest} tokens of prompt and continuation: {one.source} reads {one.max_positions}.")
    rounds = timing.warmup + timing.repeats
    found: list[list[Draft]] = []
    with draft.whole() as small, dense.whole() as large:
        for number in options.progress(range(rounds), "writing with a draft", rounds):
            drafts = [_written(small, large, one[None].to(dense.device), timing) for one in prompts]
            if number >= timing.warmup:
                found.append(drafts)
    return list(_results(draft, dense, found, prompts.shape[1], timing))


@torch.inference_mode()
def _written(small: PreTrainedModel, large: PreTrainedModel, prompt: torch.Tensor, timing: Timing) -> Draft:
    settings = GenerationConfig(
        max_new_tokens=timing.new_tokens,
        min_new_tokens=timing.new_tokens,
        do_sample=False,
        pad_token_id=0,
    )
    small.generation_config.num_assistant_tokens = timing.draft_tokens
    small.generation_config.num_assistant_tokens_schedule = "constant"
    small.generation_config.assistant_confidence_threshold = 0.0
    given: dict[str, Any] = {
        "attention_mask": torch.ones_like(prompt),
        "generation_config": settings,
    }
    started = time.perf_counter()
    plain = large.generate(prompt, **given)
    alone = time.perf_counter() - started
    with _counting(small, large) as counted:
        started = time.perf_counter()
        try:
            assisted = large.generate(prompt, assistant_model=small, **given)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelError(f"assisted generation does not work with this pair: {first_line(error)}") from error
        seconds = time.perf_counter() - started
    new = assisted.shape[1] - prompt.shape[1]
    same = bool(torch.equal(assisted[:, : plain.shape[1]], plain[:, : assisted.shape[1]]))
    return Draft(new, counted["large"], counted["small"], same, seconds, alone)


@contextmanager
def _counting(small: PreTrainedModel, large: PreTrainedModel) -> Iterator[dict[str, int]]:
    """Count the forward passes of both models."""
    passes = {"small": 0, "large": 0}

    def count(name: str) -> Any:
        def hook(*_: object) -> None:
            passes[name] += 1

        return hook

    hooks = [one.register_forward_pre_hook(count(name)) for name, one in (("small", small), ("large", large))]
    try:
        yield passes
    finally:
        for hook in hooks:
            hook.remove()


def _results(
    draft: Decoder, dense: Decoder, rounds: Sequence[Sequence[Draft]], prompt: int, timing: Timing
) -> Iterator[Result]:
    every = rounds[0]  # greedy: the same in each round
    tokens, proposed = sum(one.tokens for one in every), sum(one.proposed for one in every)
    settings = {
        "batch": 1,
        "prompts": len(every),
        "prompt": prompt,
        "new_tokens": timing.new_tokens,
        "draft_tokens": timing.draft_tokens,
        "repeats": len(rounds),
        "same_text": sum(one.same for one in every) / len(every),
    }
    yield result_of(
        draft, "model", "draft_acceptance", sum(one.accepted for one in every) / max(1, proposed), settings=settings
    )
    yield result_of(
        draft, "model", "tokens_per_check", tokens / max(1, sum(one.checks for one in every)), settings=settings
    )
    with_draft = [sum(one.tokens for one in drafts) / sum(one.seconds for one in drafts) for drafts in rounds]
    without = [sum(one.tokens for one in drafts) / sum(one.alone for one in drafts) for drafts in rounds]
    ratio = statistics.median(one / other for one, other in zip(with_draft, without, strict=True))
    name = "assisted_tokens_per_second"
    yield result_of(draft, "model", name, statistics.median(with_draft), ratio=ratio, settings=settings)
    yield result_of(dense, "against", name, statistics.median(without), ratio=1.0, settings=settings)
