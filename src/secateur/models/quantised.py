"""Quantised checkpoints that are dequantised while they are read: fine-grained FP8, and MXFP4.

FP8 (DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, https://arxiv.org/abs/2412.19437, section 3.3) stores a weight
as float8 and one scale for each block of it, most often of 128 x 128 weights: `…weight` and `…weight_scale_inv`. MXFP4
(Open Compute Project, "OCP Microscaling Formats (MX) Specification", 2023) stores two 4-bit numbers per byte and a
power of two for each 32 of them: `…_blocks` and `…_scales`, transposed with respect to the weights of the modules.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch

from secateur.errors import ModelError
from secateur.models.anatomy import text_config

DTYPE = torch.bfloat16
"""The dtype that quantised weights are dequantised to, and saved in."""

READABLE = ("fp8", "mxfp4")
"""The methods of quantisation that are undone while weights are read."""

_SCALE = "_scale_inv"
_OF_ACTIVATIONS = (".activation_scale", ".input_scale")
_PACKED, _EXPONENTS = "_blocks", "_scales"
_E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The values of a 4-bit number without its sign."""
_BIAS = 127
"""What is added to the exponent of a power of two that is stored as a byte."""


@dataclass(frozen=True)
class Quantisation:
    """How the weights of a checkpoint are quantised.

    Attributes:
        method: one of `READABLE`.
        block: rows and columns of the blocks that share an FP8 scale; None if a whole tensor has one.
    """

    method: str
    block: tuple[int, int] | None = None

    def __str__(self) -> str:
        """Say which quantisation it is."""
        return f"{self.method} (blocks of {self.block[0]} x {self.block[1]})" if self.block else self.method

    def dequantised(self, slices: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
        """Yield tensors by the names they have without quantisation; the quantised ones are dequantised when read.

        Args:
            slices: names and opened tensors; those that belong together must all be among them.
        """
        found = dict(slices)
        for name, piece in found.items():
            if self.method == "mxfp4":
                whole = name.removesuffix(_PACKED)
                if name.endswith(_PACKED) and whole + _EXPONENTS in found:
                    yield whole, _Mxfp4(name, piece, found[whole + _EXPONENTS])
                elif not (name.endswith(_EXPONENTS) and name.removesuffix(_EXPONENTS) + _PACKED in found):
                    yield name, piece
            elif name + _SCALE in found:
                yield name, _Fp8(name, piece, found[name + _SCALE], self.block)
            elif not name.endswith(_OF_ACTIVATIONS) and not (
                name.endswith(_SCALE) and name.removesuffix(_SCALE) in found
            ):
                yield name, piece

    def has_complete_blocks(self, slices: Iterable[tuple[str, Any]]) -> bool:
        """Return whether no block is cut off at an edge; transformers takes those of a tensor to be of one size."""
        found = (piece for _, piece in self.dequantised(slices) if isinstance(piece, _Fp8))
        return all(
            size % side == 0 or size < side
            for piece in found
            if piece.block is not None
            for size, side in zip(piece.get_shape()[-2:], piece.block, strict=True)
        )

    def sentence(self, source: str, original: str | None) -> str:
        """Return what the user should know about the weights."""
        named = f" ({original})" if original else ""
        to = str(DTYPE).removeprefix("torch.")
        return f"{source}: {self} dequantised to {to}; the original weights would be better{named}."


def quantisation_of(config: Any, source: str) -> Quantisation | None:
    """Return how the weights of a checkpoint with this configuration are quantised, if they can be dequantised.

    Raises:
        ModelError: the configuration gives impossible blocks.
    """
    given, method = _settings(config), quantised_by(config)
    if method not in READABLE:
        return None
    block = given.get("weight_block_size", (128, 128)) if method == "fp8" else None
    if block is not None and not (
        isinstance(block, list | tuple) and len(block) == 2 and all(type(one) is int and one > 0 for one in block)
    ):
        raise ModelError(f"{source}: weight_block_size in its config.json must be two positive integers, not {block}.")
    return Quantisation(method, None if block is None else (block[0], block[1]))


def quantised_by(config: Any) -> str | None:
    """Return how the weights of a model, or of its text decoder, are quantised; None if they are not."""
    settings = _settings(config)
    name = settings.get("quant_method")
    return str(getattr(name, "value", name)) if settings else None


def _settings(config: Any) -> dict[str, Any]:
    for one in (config, text_config(config)):
        found = getattr(one, "quantization_config", None)
        if found:
            return dict(found if isinstance(found, dict) else found.to_dict())
    return {}


def without_quantisation(config: Any) -> None:
    """Remove the quantisation from a configuration, in place."""
    for one in (config, text_config(config)):
        if hasattr(one, "quantization_config"):
            del one.quantization_config


class _Dequantised:
    """Stands for an opened tensor of safetensors; reading all of it dequantises."""

    def __init__(self, name: str, packed: Any, scales: Any) -> None:
        self.name, self.packed, self.scales = name, packed, scales

    def get_dtype(self) -> str:
        return "BF16"


class _Fp8(_Dequantised):
    def __init__(self, name: str, packed: Any, scales: Any, block: tuple[int, int] | None) -> None:
        super().__init__(name, packed, scales)
        self.block = block

    def get_shape(self) -> list[int]:
        return list(self.packed.get_shape())

    def __getitem__(self, _: Any) -> torch.Tensor:
        try:
            return from_fp8(self.packed[...], self.scales[...], self.block)
        except ValueError as error:
            raise ModelError(f"{self.name}: {error}") from error


class _Mxfp4(_Dequantised):
    def get_shape(self) -> list[int]:
        *experts, rows, groups, size = self.packed.get_shape()
        return [*experts, 2 * groups * size, rows]

    def __getitem__(self, _: Any) -> torch.Tensor:
        return from_mxfp4(self.packed[...], self.scales[...])


def from_fp8(weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None) -> torch.Tensor:
    """Return an FP8 weight times its scales, in bfloat16; the last blocks of rows and columns may be incomplete.

    Args:
        weight: (…, rows, columns) in float8.
        scales: (…, ceil(rows / block[0]), ceil(columns / block[1])), or a single number. Bytes are powers of two.
        block: rows and columns that share a scale; None if all do.

    Raises:
        ValueError: the scales do not fit.
    """
    factors = scales.float()
    if scales.dtype == torch.uint8:
        factors = torch.ldexp(torch.ones_like(factors), scales.int() - _BIAS)
    if factors.numel() == 1:
        factors, block = factors.reshape((1,) * weight.dim()), (weight.shape[-2], weight.shape[-1])
    if block is None:
        raise ValueError(f"{factors.numel()} scales, and no block size in the configuration")
    if weight.dim() == 3 and len(factors) == len(weight):
        return torch.stack([from_fp8(*pair, block) for pair in zip(weight, scales, strict=True)])
    rows, columns = weight.shape[-2:]
    expected = (*weight.shape[:-2], ceil(rows / block[0]), ceil(columns / block[1]))
    if tuple(factors.shape) != expected:
        raise ValueError(f"scales of the shape {tuple(factors.shape)}, where {expected} are expected")
    found = torch.empty(weight.shape, dtype=DTYPE)
    for number, row in enumerate(factors):
        part = slice(number * block[0], (number + 1) * block[0])
        found[part] = weight[part].float() * row.repeat_interleave(block[1])[:columns]
    return found


def from_mxfp4(packed: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Return an MXFP4 weight in bfloat16, which holds its values exactly.

    Args:
        packed: (experts, rows, groups, 16) bytes, the first number of each pair in the lower half.
        scales: (experts, rows, groups) bytes, exponents of two plus 127.

    Returns:
        (experts, 32 groups, rows), transposed as the modules hold it.
    """
    experts, rows, groups, size = packed.shape
    values = torch.tensor([*_E2M1, *(-one for one in _E2M1)])
    found = torch.empty(experts, 2 * groups * size, rows, dtype=DTYPE)
    for number in range(experts):
        pairs = torch.stack([values[(packed[number] & 15).int()], values[(packed[number] >> 4).int()]], dim=-1)
        scaled = torch.ldexp(pairs.flatten(2), scales[number].int().unsqueeze(-1) - _BIAS)
        found[number] = scaled.flatten(1).T
    return found
