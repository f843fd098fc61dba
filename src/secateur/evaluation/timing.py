"""Timing and peak memory of a decoder in use: prefill of a prompt, then decoding token by token with the cache.

Both are done here rather than by `generate`, so that only the model is timed and every model generates the same number
of tokens. On a GPU the clock is read after the device has finished.
"""

from __future__ import annotations

import inspect
import statistics
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import psutil
import torch
from torch import nn
from transformers import PreTrainedModel

from secateur.errors import InputError, ModelError
from secateur.models.decoder import Decoder
from secateur.models.shards import return_freed_memory

_SAMPLING_SECONDS = 0.001


@dataclass(frozen=True)
class Request:
    """A request to a model.

    Attributes:
        batch: number of sequences.
        prompt: prompt tokens of each.
        new_tokens: tokens of each generated after the prompt, one by one.
    """

    batch: int = 1
    prompt: int = 128
    new_tokens: int = 32

    def tokens(self, decoder: Decoder, seed: int = 0) -> torch.Tensor:
        """Return random prompts, (batch, prompt), on the model's device.

        Raises:
            InputError: a number below 1, or more tokens than the model has positions.
        """
        if min(self.batch, self.prompt, self.new_tokens) < 1:
            raise InputError("batch size, prompt length and new tokens must be at least 1.")
        limit = decoder.max_positions
        if limit is not None and self.prompt + self.new_tokens > limit:
            raise InputError(
                f"{decoder.source}: a prompt of {self.prompt} and {self.new_tokens} new tokens are more than the "
                f"{limit} positions of the model."
            )
        vocabulary = decoder.module.get_input_embeddings().num_embeddings
        drawn = torch.randint(0, vocabulary, (self.batch, self.prompt), generator=torch.Generator().manual_seed(seed))
        return drawn.to(decoder.device)


@dataclass(frozen=True)
class Lap:
    """Times of one request in seconds.

    Attributes:
        prefill: until the prompt is processed: hidden states, cache, and the logits of the last position.
        first: until the first new token is known.
        decode: from then until the last.
        cache_bytes: size of the cache after the prompt.
    """

    prefill: float
    first: float
    decode: float
    cache_bytes: int

    @property
    def whole(self) -> float:
        """Seconds of the whole request."""
        return self.first + self.decode


@torch.no_grad()
def answer(module: PreTrainedModel, tokens: torch.Tensor, new_tokens: int) -> Lap:
    """Process the prompts (batch, prompt) and decode greedily; `new_tokens` = 1 + the steps with the cache.

    Raises:
        ModelError: the model returns no cache.
    """
    short = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(module.forward).parameters else {}
    devices = {parameter.device for parameter in module.parameters()}
    begin = _now(devices)
    output = module(input_ids=tokens, use_cache=True, **short)
    read = _now(devices)
    following = output.logits[:, -1:].argmax(-1).to(tokens.device)
    first = _now(devices)
    cache = getattr(output, "past_key_values", None)
    if cache is None:
        raise ModelError(f"{type(module).__name__} returns no key/value cache; its speed cannot be measured.")
    held = cache_bytes(cache)
    resumed = _now(devices)
    for _ in range(new_tokens - 1):
        output = module(input_ids=following, past_key_values=cache, use_cache=True, **short)
        following = output.logits[:, -1:].argmax(-1).to(tokens.device)
    return Lap(read - begin, first - begin, _now(devices) - resumed, held)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of all keys and values in a cache; states of linear attention, which do not grow, are none."""
    tensors = [getattr(layer, name, None) for layer in cache.layers for name in ("keys", "values")]
    return sum(one.numel() * one.element_size() for one in tensors if one is not None)


def _now(devices: set[torch.device]) -> float:
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()
    return time.perf_counter()


@dataclass(frozen=True)
class BlockTimes:
    """The time of a request by part of the model.

    Attributes:
        blocks: seconds in each block; blocks of one kind share the median over all of them.
        other: seconds in everything else: embeddings, masks, final norm, head, choice of the token.
        request: the request.
    """

    blocks: tuple[float, ...]
    other: float
    request: Request

    @property
    def whole(self) -> float:
        """Seconds of the whole request."""
        return sum(self.blocks) + self.other


def time_blocks(
    decoder: Decoder, request: Request, *, kinds: Sequence[Any] | None = None, repeats: int = 5
) -> BlockTimes:
    """Measure the time in each block over one request.

    Args:
        decoder: the model; a skeleton is read into memory for it.
        request: the request.
        kinds: one value per block, equal for blocks that do the same work; None treats all as different.
        repeats: number of requests, after a warm-up.
    """
    tokens = request.tokens(decoder)
    rounds: list[tuple[list[float], float]] = []
    with decoder.whole() as module:
        for _ in range(repeats + 1):
            with _timing_blocks(decoder.block_list) as seconds:
                lap = answer(module, tokens, request.new_tokens)
            rounds.append((seconds(), lap.whole))
    counted = rounds[1:]
    kinds = kinds if kinds is not None else range(decoder.block_count)
    by_kind = {
        kind: statistics.median(blocks[i] for blocks, _ in counted for i, one in enumerate(kinds) if one == kind)
        for kind in kinds
    }
    other = statistics.median(max(0.0, whole - sum(blocks)) for blocks, whole in counted)
    return BlockTimes(tuple(by_kind[kind] for kind in kinds), other, request)


@contextmanager
def _timing_blocks(blocks: nn.ModuleList) -> Iterator[Callable[[], list[float]]]:
    """Time every call of every block; yield a function that returns the total seconds of each."""
    timestamps: list[list[Any]] = [[] for _ in blocks]

    def watch(index: int) -> Callable[..., None]:
        return lambda block, *_: timestamps[index].append(_timestamp(block))

    hooks = [block.register_forward_pre_hook(watch(index)) for index, block in enumerate(blocks)]
    hooks += [block.register_forward_hook(watch(index)) for index, block in enumerate(blocks)]
    try:
        yield lambda: [sum(map(_between, one[::2], one[1::2])) for one in timestamps]
    finally:
        for hook in hooks:
            hook.remove()


def _timestamp(block: nn.Module) -> Any:
    """Record the time; on CUDA as a device event, so that nothing has to wait."""
    device = next(block.parameters()).device
    if device.type != "cuda":
        return _now({device})
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def _between(left: Any, right: Any) -> float:
    return right - left if isinstance(left, float) else left.elapsed_time(right) / 1000


def weight_bytes(module: nn.Module) -> int:
    """Return the bytes of all parameters and buffers in memory, tied ones once."""
    tensors = {id(one): one for one in (*module.parameters(), *module.buffers())}
    return sum(one.numel() * one.element_size() for one in tensors.values())


def peak_memory(module: nn.Module, work: Callable[[], Any]) -> dict[str, int]:
    """Return the peak bytes of a model at work: its own weights, and what the work adds at its peak.

    Other models in the process do not count. On a CPU the added memory is the growth of the resident set (sampled every
    millisecond), on CUDA what the allocator hands out (`allocated`) and holds (`reserved`).
    """
    own = weight_bytes(module)
    devices = {parameter.device for parameter in module.parameters() if parameter.device.type == "cuda"}
    if not devices:
        return_freed_memory()
        return {"peak_resident_bytes": own + _resident_growth(work)}
    torch.cuda.empty_cache()
    before = [(torch.cuda.memory_allocated(one), torch.cuda.memory_reserved(one)) for one in devices]
    for one in devices:
        torch.cuda.reset_peak_memory_stats(one)
    work()
    after = [(torch.cuda.max_memory_allocated(one), torch.cuda.max_memory_reserved(one)) for one in devices]
    allocated, reserved = (
        sum(high[kind] - low[kind] for low, high in zip(before, after, strict=True)) for kind in (0, 1)
    )
    return {"peak_allocated_bytes": own + allocated, "peak_reserved_bytes": own + reserved}


def _resident_growth(work: Callable[[], Any]) -> int:
    process = psutil.Process()
    before = process.memory_info().rss
    seen, done = [before], threading.Event()

    def look() -> None:
        while not done.wait(_SAMPLING_SECONDS):
            seen.append(process.memory_info().rss)

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        work()
        seen.append(process.memory_info().rss)
    finally:
        done.set()
        watcher.join()
    return max(seen) - before
