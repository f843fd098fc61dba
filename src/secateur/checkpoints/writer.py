"""Write weights part by part into safetensors shards, so that a skeleton is never whole in memory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from secateur.errors import InputError, NumericsError
from secateur.models.anatomy import saved_tensors
from secateur.models.decoder import Decoder
from secateur.models.shards import float32_names, to_checkpoint

SHARD_BYTES = 2 << 30


def write_weights(decoder: Decoder, folder: Path, dtype: torch.dtype, shard_bytes: int = SHARD_BYTES) -> int:
    """Write all weights: one file if they fit in a shard, otherwise numbered shards and their index.

    Returns:
        Bytes of tensor data written.

    Raises:
        InputError: there is not enough room for the weights.
        NumericsError: a weight is NaN or infinite, or becomes so in the dtype to be saved.
    """
    _require_room(decoder, folder, dtype)
    shard: dict[str, torch.Tensor] = {}
    filled = total = 0
    places: dict[str, int] = {}
    count = 0
    for part in _parts(decoder, dtype):
        for name, tensor in part.items():
            size = tensor.numel() * tensor.element_size()
            if shard and filled + size > shard_bytes:
                count = _flush(shard, folder, count)
                filled = 0
            shard[name] = tensor
            places[name] = count
            filled += size
            total += size
    count = _flush(shard, folder, count)
    _name_shards(folder, places, count, total, decoder.parameter_count)
    return total


def _parts(decoder: Decoder, dtype: torch.dtype) -> Iterator[dict[str, torch.Tensor]]:
    """Yield the weights outside the blocks, then those of each block, named as in a checkpoint."""
    module = decoder.module
    blocks = f"{decoder.anatomy.family.blocks}."
    stays = float32_names(module, dtype, decoder.folder if dtype == decoder.saved_dtype else None)
    once = {name for name, _ in saved_tensors(module)}  # what several blocks share is with the first of them
    with decoder.outer():
        state = {name: tensor for name, tensor in saved_tensors(module) if not name.startswith(blocks)}
        yield to_checkpoint(module, _converted(state, dtype, stays))
    for index in range(decoder.block_count):
        with decoder.block(index) as block:
            named = {f"{decoder.anatomy.block_path(index)}.{name}": tensor for name, tensor in saved_tensors(block)}
            state = {name: tensor for name, tensor in named.items() if name in once}
            yield to_checkpoint(module, _converted(state, dtype, stays))


def _converted(
    state: dict[str, torch.Tensor], dtype: torch.dtype, stays_float32: Callable[[str], bool]
) -> dict[str, torch.Tensor]:
    """Round floating-point tensors to a dtype, except those kept in float32."""
    converted = {}
    for name, tensor in state.items():
        rounded = torch.float32 if stays_float32(name) else dtype
        result = tensor.detach().to("cpu", rounded if tensor.is_floating_point() else tensor.dtype).contiguous()
        if result.is_floating_point() and not bool(torch.isfinite(result).all()):
            raise NumericsError(
                f"{name}: NaN or infinity in the weights; the checkpoint is damaged or {dtype} too small."
            )
        converted[name] = result
    return converted


def _require_room(decoder: Decoder, folder: Path, dtype: torch.dtype) -> None:
    needed = decoder.parameter_count * dtype.itemsize
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise InputError(
            f"{folder.parent}: the weights need {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free. "
            "Free some space, or choose another disk."
        )


def _flush(shard: dict[str, torch.Tensor], folder: Path, count: int) -> int:
    if not shard:
        return count
    try:
        save_file(shard, _temporary(folder, count), {"format": "pt"})
    except SafetensorError as error:
        raise InputError(f"{folder.parent}: the weights cannot be written ({error}); nothing was kept.") from error
    shard.clear()
    return count + 1


def _temporary(folder: Path, number: int) -> Path:
    return folder / f"shard-{number}.safetensors"


def _name_shards(folder: Path, places: dict[str, int], count: int, total: int, parameters: int) -> None:
    if count == 1:
        _temporary(folder, 0).rename(folder / "model.safetensors")
        return
    names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
    for number, name in enumerate(names):
        _temporary(folder, number).rename(folder / name)
    index = {
        "metadata": {"total_size": total, "total_parameters": parameters},
        "weight_map": {name: names[number] for name, number in sorted(places.items())},
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
