"""Speed and memory of a model and of the one it is compared with, alternating in one process.

In each round every model answers the same requests, and the last model of a round is the first of the next, so that
whatever slows the machine down affects both. Figures are medians over rounds; ratios are computed within rounds.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator
from transformers import PreTrainedModel

from secateur.errors import InputError
from secateur.evaluation.results import Result, result_of
from secateur.evaluation.timing import Lap, Request, answer, peak_memory
from secateur.models.decoder import Decoder
from secateur.run_options import RunOptions

PROMPTS = (128, 512)
BATCHES = (1, 8)
NEW_TOKENS = 32

Laps = dict[str, list[Lap]]
"""Times of each model, round by round."""

SPEEDS: dict[str, Callable[[Lap, Request], float]] = {
    "prefill_tokens_per_second": lambda lap, asked: asked.batch * asked.prompt / lap.prefill,
    "decode_tokens_per_second": lambda lap, asked: asked.batch * (asked.new_tokens - 1) / lap.decode,
    "time_to_first_token": lambda lap, _: lap.first,
}
"""Measures of a request: tokens per second of prefill and decoding, and seconds to the first new token."""


class Timing(BaseModel):
    """Which requests `bench` times, and how often.

    Attributes:
        batch_sizes: sequences per request.
        prompts: tokens per prompt; None takes 128 and 512, as far as the models' positions allow.
        new_tokens: tokens generated after the prompt, with the cache.
        repeats: rounds that are measured.
        warmup: rounds before those.
        draft_tokens: tokens that a draft model writes before each check.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    batch_sizes: tuple[int, ...] = BATCHES
    prompts: tuple[int, ...] | None = None
    new_tokens: int = NEW_TOKENS
    repeats: int = 5
    warmup: int = 1
    draft_tokens: int = 5

    @model_validator(mode="after")
    def _possible(self) -> Timing:
        if self.repeats < 1 or self.warmup < 0 or self.new_tokens < 2:
            raise InputError("repeats must be at least 1, warm-up rounds 0 or more, new tokens at least 2.")
        if self.draft_tokens < 1:
            raise InputError("a draft has at least one token.")
        if not self.batch_sizes or self.prompts == ():
            raise InputError("no batch size or no prompt length given.")
        return self


def measure_speed(model: Decoder, against: Decoder | None, timing: Timing, options: RunOptions) -> list[Result]:
    """Time a model, alternating with the one it is compared with; see `secateur.bench`.

    Raises:
        InputError: more tokens than a model has positions.
        ModelError: a model without a key/value cache.
    """
    new_tokens, repeats, warmup = timing.new_tokens, timing.repeats, timing.warmup
    models = {"model": model} | ({"against": against} if against is not None else {})
    requests = [
        Request(batch, prompt, new_tokens)
        for batch in timing.batch_sizes
        for prompt in (timing.prompts if timing.prompts is not None else _prompts_that_fit(models.values(), new_tokens))
    ]
    tokens = {(role, asked): asked.tokens(one, options.seed) for role, one in models.items() for asked in requests}
    results: list[Result] = []
    with ExitStack() as open_models:
        modules = {role: open_models.enter_context(one.whole()) for role, one in models.items()}
        rounds = options.progress(range(warmup + repeats), "measuring speed", warmup + repeats)
        laps = {asked: {role: list[Lap]() for role in models} for asked in requests}
        for number in rounds:
            for asked in requests:
                for role in _taking_turns(models, number):
                    lap = answer(modules[role], tokens[role, asked], new_tokens)
                    if number >= warmup:
                        laps[asked][role].append(lap)
        for asked in requests:
            results += _speeds(models, asked, laps[asked], warmup)
            results += _memory(models, modules, asked, tokens)
    return [*results, *_sizes(models, requests[0], laps[requests[0]])]


def _prompts_that_fit(models: Any, new_tokens: int) -> tuple[int, ...]:
    room = min((one.max_positions or PROMPTS[-1] + new_tokens) - new_tokens for one in models)
    return tuple(prompt for prompt in PROMPTS if prompt <= room) or (max(1, room),)


def _taking_turns(models: Mapping[str, Decoder], number: int) -> Iterator[str]:
    return iter(list(models) if number % 2 == 0 else reversed(list(models)))


def _speeds(models: Mapping[str, Decoder], asked: Request, laps: Laps, warmup: int) -> Iterator[Result]:
    for measure, read in SPEEDS.items():
        for role, one in models.items():
            values = [read(lap, asked) for lap in laps[role]]
            yield result_of(
                one,
                role,
                measure,
                statistics.median(values),
                ratio=_ratio(values, [read(lap, asked) for lap in laps["against"]]) if "against" in laps else None,
                spread=_quartiles(values),
                settings=_settings(asked) | {"repeats": len(values), "warmup": warmup},
            )


def _ratio(values: Sequence[float], dense: Sequence[float]) -> float:
    return statistics.median(one / other for one, other in zip(values, dense, strict=True))


def _quartiles(values: Sequence[float]) -> dict[str, float]:
    if len(values) < 2:
        return {}
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return {"low": low, "high": high}


def _memory(
    models: Mapping[str, Decoder],
    modules: Mapping[str, PreTrainedModel],
    asked: Request,
    tokens: Mapping[tuple[str, Request], Any],
) -> Iterator[Result]:
    found: dict[str, dict[str, int]] = {}
    for role, module in modules.items():
        work = functools.partial(answer, module, tokens[role, asked], asked.new_tokens)
        found[role] = peak_memory(module, work)
    for role, one in models.items():
        for measure, value in found[role].items():
            yield result_of(
                one,
                role,
                measure,
                value,
                ratio=value / found["against"][measure] if "against" in found else None,
                settings=_settings(asked),
            )


def _sizes(models: Mapping[str, Decoder], asked: Request, laps: Laps) -> Iterator[Result]:
    """Yield sizes that do not depend on the request (except that sliding windows cache no more than themselves)."""
    found: dict[str, dict[str, float]] = {
        "cache_bytes_per_token": {role: laps[role][0].cache_bytes / (asked.batch * asked.prompt) for role in models},
        "checkpoint_bytes": {role: one.checkpoint_bytes for role, one in models.items()},
        "parameters": {role: one.parameter_count for role, one in models.items()},
    }
    for measure, values in found.items():
        for role, one in models.items():
            ratio = values[role] / values["against"] if values.get("against") else None
            settings = {"prompt": asked.prompt} if measure == "cache_bytes_per_token" else {}
            yield result_of(one, role, measure, values[role], ratio=ratio, settings=settings)


def _settings(asked: Request) -> dict[str, Any]:
    return {"batch": asked.batch, "prompt": asked.prompt, "new_tokens": asked.new_tokens}
