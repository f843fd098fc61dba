"""Run a decoder block by block, each with exactly the arguments its own model passes to it.

The model is called once with a recorder in place of every block's `forward`; a recorder saves its arguments and returns
its input. Only the embeddings need weights for that, and it works for masks, rotary tables and position biases that
differ from block to block, where passing block 0's arguments to all blocks would not.

Where a block passes on several residual streams, (batch, positions, streams, d) or (streams, batch, positions, d), they
are side by side in the last axis of the hidden states here, (batch, positions, streams · d).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from secateur.errors import ModelError, NumericsError
from secateur.models.anatomy import find
from secateur.models.decoder import Decoder


@dataclass(frozen=True)
class Call:
    """Arguments of one block other than the hidden states.

    Attributes:
        args: those by position.
        kwargs: those by name.
        streams: the shape (streams, d) of the hidden states of a token; empty where they are one axis.
        streams_first: whether the block takes them with the streams as the first axis.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    streams: tuple[int, ...] = ()
    streams_first: bool = False


_PLAIN = 3
"""Axes of hidden states that are one stream: batch, positions, d."""


def _side_by_side(hidden: torch.Tensor, *, first: bool) -> torch.Tensor:
    return (hidden.permute(1, 2, 0, 3) if first else hidden).flatten(2)


def _apart(hidden: torch.Tensor, streams: tuple[int, ...], *, first: bool) -> torch.Tensor:
    found = hidden.unflatten(-1, streams)
    return found.permute(2, 0, 1, 3).contiguous() if first else found


class _Stop(Exception):
    """Ends the recording at the last block."""


def capture(
    decoder: Decoder, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> tuple[torch.Tensor, list[Call]]:
    """Return the input of block 0 and the arguments of each block for these tokens.

    Args:
        decoder: the model; a skeleton reads its embeddings for this and frees them again.
        tokens: int64, (batch, positions).
        mask: bool, (batch, positions), True at real tokens; None where nothing is padded.

    Returns:
        The residual stream entering block 0, (batch, positions, d), and one `Call` per block.
    """
    calls: list[Call] = []
    first: list[torch.Tensor] = []
    last, leading = decoder.block_count - 1, decoder.anatomy.family.streams_first

    def recorder(index: int) -> Callable[..., Any]:
        def record(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            several = hidden.dim() > _PLAIN and hidden.shape[leading : 2 + leading] == tokens.shape
            streams = (*hidden.shape[:leading], *hidden.shape[2 + leading :]) if several else ()
            if index == 0:
                first.append(_side_by_side(hidden, first=leading) if streams else hidden)
            calls.append(Call(args, kwargs, streams, leading))
            if index == last:
                raise _Stop
            return _as_block_output(decoder, hidden)

        return record

    with decoder.outer(head=False), _forwards(decoder.block_list, recorder):
        try:
            _call(decoder.module, tokens, mask)
        except _Stop:
            return first[0], calls
    raise ModelError(f"{decoder.source}: the model's forward did not call all of its {last + 1} blocks.")


def run_block(
    block: nn.Module, call: Call, hidden: torch.Tensor, weights: Mapping[str, torch.Tensor] | None = None
) -> torch.Tensor:
    """Run one block on hidden states (batch, positions, d) with the arguments recorded for it.

    `weights` replace the block's own parameters by name.
    """
    if call.streams:
        hidden = _apart(hidden, call.streams, first=call.streams_first)
    if weights is None:
        output = block(hidden, *call.args, **call.kwargs)
    else:
        output = functional_call(block, dict(weights), (hidden, *call.args), call.kwargs)
    result: torch.Tensor = output[0] if isinstance(output, tuple | list) else output
    return _side_by_side(result, first=call.streams_first) if call.streams else result


def logits(
    decoder: Decoder, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the logits (batch, positions, vocabulary) for the output of the last block: final norm, head, scaling.

    `decoder.outer()` must be open around this call for a skeleton.
    """
    with _blocks_giving(decoder, hidden):
        result: torch.Tensor = _call(decoder.module, tokens, mask).logits
    return result


def final_states(
    decoder: Decoder, hidden: torch.Tensor, tokens: torch.Tensor, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the input of the head, (batch, positions, d): the output of the last block after the final norm.

    `decoder.outer(head=False)` must be open around this call for a skeleton.
    """
    with _blocks_giving(decoder, hidden):
        base = decoder.module.base_model  # of Llama 4's text model this is the model with its head
        inner = base if base is not decoder.module else find(base, decoder.anatomy.family.blocks.rpartition(".")[0])
        result: torch.Tensor = _call(inner, tokens, mask).last_hidden_state
    return result


@contextmanager
def inputs_of(modules: Sequence[nn.Module]) -> Iterator[list[torch.Tensor]]:
    """Collect the first input of each of these modules, in the order of their calls."""
    entering: list[torch.Tensor] = []
    hooks = [module.register_forward_pre_hook(lambda _, args: entering.append(args[0])) for module in modules]
    try:
        yield entering
    finally:
        for hook in hooks:
            hook.remove()


def require_finite(hidden: torch.Tensor, where: str, mask: torch.Tensor | None = None) -> None:
    """Raise on NaN or infinity.

    Raises:
        NumericsError: the message says where.
    """
    looked_at = hidden if mask is None else hidden[mask.to(hidden.device)]
    if not bool(torch.isfinite(looked_at).all()):
        raise NumericsError(
            f"NaN or infinity in {where}. The weights may be damaged, or the dtype too small: try --dtype float32."
        )


def same_calls(left: Sequence[Call], right: Sequence[Call]) -> bool:
    """Return whether two batches call the blocks with the same arguments, so that one copy serves both."""
    return len(left) == len(right) and all(
        _same((a.args, *a.kwargs.items()), (b.args, *b.kwargs.items())) for a, b in zip(left, right, strict=True)
    )


def _same(left: Any, right: Any) -> bool:
    if left is right:
        return True
    if type(left) is not type(right):
        return False
    if isinstance(left, MutableMapping) and not left:
        return False  # blocks fill it, with keys and values for others, so every batch needs its own
    if isinstance(left, torch.Tensor):
        return left.shape == right.shape and left.dtype == right.dtype and torch.equal(left, right)
    if isinstance(left, tuple | list):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(_same(left[k], right[k]) for k in left)
    return bool(left == right)


def _call(module: nn.Module, tokens: torch.Tensor, mask: torch.Tensor | None) -> Any:
    given = {} if mask is None else {"attention_mask": mask.long()}
    return module(input_ids=tokens, use_cache=False, **given)


def _as_block_output(decoder: Decoder, hidden: torch.Tensor) -> Any:
    return (hidden, None) if decoder.anatomy.family.tuple_output else hidden


@contextmanager
def _blocks_giving(decoder: Decoder, hidden: torch.Tensor) -> Iterator[None]:
    """Make every block return these hidden states, so that only what follows the blocks is computed."""

    family = decoder.anatomy.family
    streams = (family.streams, hidden.shape[-1] // family.streams)

    def stub(_: int) -> Callable[..., Any]:
        def passed_on(entering: torch.Tensor, *_args: Any, **_kwargs: Any) -> Any:
            several = entering.dim() > _PLAIN
            return _as_block_output(decoder, _apart(hidden, streams, first=family.streams_first) if several else hidden)

        return passed_on

    with _forwards(decoder.block_list, stub):
        yield


@contextmanager
def _forwards(blocks: nn.ModuleList, make: Callable[[int], Callable[..., Any]]) -> Iterator[None]:
    """Temporarily replace every block's forward, keeping its class, hooks and attributes."""
    before = [block.__dict__.get("forward") for block in blocks]
    try:
        for index, block in enumerate(blocks):
            block.forward = make(index)
        yield
    finally:
        for block, forward in zip(blocks, before, strict=True):
            if forward is None:
                block.__dict__.pop("forward", None)  # if it was interrupted before, there is none yet
            else:
                block.forward = forward
