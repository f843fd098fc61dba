"""Write a GGUF file tensor by tensor, and read back what was written."""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from secateur.errors import CheckError, InputError, NumericsError
from secateur.export.gguf_header import Entry, read_header

PROVENANCE = "secateur.provenance"
"""The entry by which files that secateur wrote are recognised: what was pruned, and how."""

TYPES = ("f32", "f16", "bf16", "q8_0")
"""Types in which matrices are written; llama.cpp's quantiser makes others from them."""

_FILE_TYPES = {"f32": 0, "f16": 1, "q8_0": 7, "bf16": 32}
_BLOCK = 32


@dataclass(frozen=True)
class Written:
    """A tensor of a file: its shape, its type there, and a checksum of its bytes."""

    shape: tuple[int, ...]
    kind: int
    checksum: int


def stored_type(name: str, shape: tuple[int, ...], kind: str) -> str:
    """Return the type of a tensor in a file of this type: vectors, routers and tables of positions stay float32."""
    if len(shape) == 1 or name.startswith("position_embd") or "ffn_gate_inp" in name:
        return "f32"
    return "f16" if kind == "q8_0" and shape[-1] % _BLOCK else kind


class GgufFile:
    """A GGUF file under construction: entries and shapes first, then the tensors in the same order."""

    def __init__(self, path: Path, architecture: str, kind: str) -> None:
        """Start a file whose matrices are of this type."""
        import gguf

        self._gguf: Any = gguf
        self._path, self._kind = path, kind
        self._writer = gguf.GGUFWriter(path, architecture)
        self._writer.add_file_type(_FILE_TYPES[kind])
        self._writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        self.written: dict[str, Written] = {}

    def add_entries(self, entries: dict[str, Entry]) -> None:
        """Add entries of the header."""
        kinds = self._gguf.GGUFValueType
        for name, entry in entries.items():
            kind = None if entry.kind is None else kinds(entry.kind)
            of = None if entry.of is None else kinds(entry.of)
            if kind is None:
                kind, of = _kind_of(entry.value, kinds), None
                if kind == kinds.ARRAY:
                    of = (
                        kinds.INT32
                        if isinstance(entry.value[0], int) and not isinstance(entry.value[0], bool)
                        else (_kind_of(entry.value[0], kinds))
                    )
            self._writer.add_key_value(name, entry.value, kind, of)

    def write(self, shapes: Iterable[tuple[str, torch.Tensor]], tensors: Iterable[tuple[str, torch.Tensor]]) -> int:
        """Write the file; tensors come in float32 and are rounded here.

        Returns:
            The bytes of the file.

        Raises:
            NumericsError: a weight is NaN or infinite, or becomes so.
        """
        for name, tensor in shapes:
            kind = self._stored(name, tensor)
            size, width = self._gguf.GGML_QUANT_SIZES[kind]
            self._writer.add_tensor_info(
                name, tuple(tensor.shape), np.dtype(np.float32), tensor.numel() // size * width, kind
            )
        self._writer.write_header_to_file()
        self._writer.write_kv_data_to_file()
        self._writer.write_ti_data_to_file()
        for name, tensor in tensors:
            kind = self._stored(name, tensor)
            data = self._rounded(name, tensor, kind.name.lower())
            self.written[name] = Written(tuple(tensor.shape), int(kind), _checksum(data))
            self._writer.write_tensor_data(data)
        self._writer.close()
        return self._path.stat().st_size

    def _stored(self, name: str, tensor: torch.Tensor) -> Any:
        return self._gguf.GGMLQuantizationType[stored_type(name, tuple(tensor.shape), self._kind).upper()]

    def _rounded(self, name: str, tensor: torch.Tensor, kind: str) -> np.ndarray[Any, Any]:
        floats = {"f16": torch.float16, "bf16": torch.bfloat16}
        rounded = tensor.to(floats[kind]) if kind in floats else tensor
        if not all(bool(torch.isfinite(end.to(rounded.dtype))) for end in tensor.aminmax()):
            raise NumericsError(f"{name}: NaN or infinity in the weights; the model is damaged, or {kind} too small.")
        if kind == "bf16":
            return np.ascontiguousarray(rounded.view(torch.int16).numpy())
        values: np.ndarray[Any, Any] = np.ascontiguousarray(rounded.numpy())
        if kind == "q8_0":
            values = self._gguf.quants.quantize(values, self._gguf.GGMLQuantizationType.Q8_0)
        return values

    def read_back(self) -> None:
        """Compare every tensor of the written file with what was written.

        Raises:
            CheckError: one is missing, or differs.
        """
        header = read_header(self._path)
        data = np.memmap(self._path, np.uint8, "r")
        found = {
            name: Written(place.shape, place.kind, _checksum(data[place.begin : place.begin + place.bytes]))
            for name, place in header.tensors.items()
        }
        wrong = sorted(name for name in {*found, *self.written} if found.get(name) != self.written.get(name))
        if wrong:
            raise CheckError(f"{self._path}: {', '.join(wrong[:4])} read back differently; is the disk damaged?")


def _kind_of(value: Any, kinds: Any) -> Any:
    for python, kind in ((bool, kinds.BOOL), (int, kinds.UINT32), (float, kinds.FLOAT32), (str, kinds.STRING)):
        if isinstance(value, python):
            return kind
    return kinds.ARRAY


def _checksum(data: np.ndarray[Any, Any]) -> int:
    return zlib.crc32(np.ascontiguousarray(data).view(np.uint8).data)


def require_replaceable(path: Path) -> None:
    """Refuse a target that exists and is no GGUF file that secateur wrote.

    Raises:
        InputError: it exists and is something else.
    """
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file, such as {path / 'model.gguf'}.")
    if not path.exists():
        return
    with path.open("rb") as stream:
        ours = stream.read(4) == b"GGUF" and PROVENANCE in read_header(path).entries
    if not ours:
        raise InputError(f"{path}: exists and was not written by secateur; choose another name, or remove it.")
