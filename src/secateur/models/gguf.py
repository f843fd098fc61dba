"""GGUF files as models: dequantised once into a cached folder of safetensors, which everything else opens.

transformers reads the file (`gguf_file=`): configuration, weights, tokenizer, chat template.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import re
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.utils import is_gguf_available

from secateur.errors import InputError, ModelError, first_line
from secateur.files import building, cache_folder, replace_file, require_room
from secateur.models.dtypes import DTYPES
from secateur.reading import MIB, FileKind, from_json
from secateur.versions import versions

SUFFIX = ".gguf"

RECORD = "gguf.json"
"""The record, in a cached folder, of the file it was made from."""

_PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.IGNORECASE)
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_SAMPLES, _SAMPLE_BYTES = 32, 256 << 10


@dataclass(frozen=True)
class Origin:
    """The GGUF file that a cached folder was made from.

    Attributes:
        file: its path.
        stored: how most of its weights are stored, such as `Q4_1`.
        dtype: their dtype after dequantisation.
        licence: the model's licence, according to the file.
        unread: metadata of the file that transformers does not read.
    """

    file: str
    stored: str
    dtype: str
    licence: str | None = None
    unread: tuple[str, ...] = ()

    def sentence(self) -> str | None:
        """Return what the user should know about the weights; None if nothing was lost."""
        said = []
        if self.stored not in _FLOATS:
            said.append(f"{self.stored} dequantised to {self.dtype}; the original weights would be better")
        if self.unread:
            said.append(f"transformers does not read {', '.join(self.unread)} of it: long texts are read differently")
        return f"{Path(self.file).name}: {'. '.join(said)}." if said else None


def find_gguf(source: str | Path) -> Path | None:
    """Return the GGUF file that a local path names: the file, or the one in a folder without safetensors.

    Raises:
        InputError: a folder with several.
    """
    path = Path(source)
    if path.suffix.lower() == SUFFIX and path.is_file():
        return path
    if not path.is_dir() or any(path.glob("*.safetensors*")):
        return None
    names = sorted(file.name for file in path.iterdir() if file.suffix.lower() == SUFFIX)
    return path / choose(names, str(source)) if names else None


def choose(names: Sequence[str], where: str) -> str:
    """Return the only model among the GGUF files of a folder or repository; of a split one the first part.

    Raises:
        InputError: there are several.
    """
    models = sorted({(match[1] if (match := _PART.fullmatch(name)) else name) for name in names})
    if len(models) > 1:
        shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
        raise InputError(f"{where}: holds several GGUF files ({shown}); name one, such as {where}/{names[0]}.")
    return min(names)


def described(file: Path) -> Path:
    """Return a cached folder with the configuration and the tokenizer of a GGUF file; no weights are read.

    Raises:
        InputError: the package `gguf` is missing, or the cache cannot be written.
        ModelError: not a GGUF, damaged, in parts, or of an architecture that transformers cannot read.
    """
    _require_package()
    _refuse_parts(file)
    _refuse_other_formats(file)
    target = _cached(file, "shapes")
    if not target.is_dir():
        with building(target) as folder:
            origin = _examined(file)
            config = _reading(file, AutoConfig)
            config.dtype = DTYPES[origin.dtype]
            config.save_pretrained(folder)
            _reading(file, AutoTokenizer).save_pretrained(folder)
            if origin.licence is not None:
                (folder / "README.md").write_text(f"---\nlicense: {origin.licence}\n---\n", encoding="utf-8")
            _write_record(folder, origin)
    _keep_path(target, file)
    return target


def dequantised(file: Path) -> Path:
    """Return a cached folder that holds a GGUF file as an ordinary checkpoint; it is created if it does not exist.

    Raises:
        InputError: as `described`, or there is no room for the weights.
        ModelError: as `described`, or the weights do not fit the architecture.
    """
    if (folder := finished(file)) is not None:
        return folder
    shapes = described(file)
    target = _cached(file, "model")
    with building(target) as folder:
        origin = _convert(file, shapes, folder)
        for carried in filter(Path.is_file, shapes.iterdir()):
            if not (folder / carried.name).exists():
                shutil.copyfile(carried, folder / carried.name)
        _write_record(folder, origin)
    return target


def finished(file: Path) -> Path | None:
    """Return the cached folder of a GGUF file that was already dequantised; None if it was not.

    Raises:
        ModelError: the file is one part of several.
    """
    _refuse_parts(file)
    target = _cached(file, "model")
    if not (target / RECORD).is_file():
        return None
    _keep_path(target, file)
    return target


def origin_of(folder: Path) -> Origin | None:
    """Return the GGUF file that a folder of the cache was made from; None for any other folder."""
    if not (folder / RECORD).is_file():
        return None
    record = FileKind("record", MIB, error=ModelError, advice=f"Remove {folder}, it is created again.")
    return record.parsed(folder / RECORD, _origin_in)


def _origin_in(text: str) -> Origin:
    found = from_json(text)["gguf"]
    return Origin(**found | {"unread": tuple(found["unread"])})


def readable_architectures() -> list[str]:
    """List the architectures that transformers reads from GGUF files."""
    from transformers.integrations.gguf import GGUF_CONFIG_ARCHS
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return sorted({*GGUF_SUPPORTED_ARCHITECTURES, *GGUF_CONFIG_ARCHS} - {"general", "tokenizer"})


# What is refused


def _require_package() -> None:
    if not is_gguf_available():
        raise InputError("reading GGUF files needs the package gguf: pip install 'secateur[gguf]'.")


def _refuse_parts(file: Path) -> None:
    found = _PART.fullmatch(file.name)
    if found is None:
        return
    stem, _, count = found.groups()
    names = [f"{stem}-{number:05d}-of-{count}{SUFFIX}" for number in range(1, int(count) + 1)]
    missing = [name for name in names if not (file.parent / name).is_file()]
    if missing:
        raise ModelError(f"{file}: part of a split GGUF, and {', '.join(missing[:4])} is missing; copy all parts.")
    raise _in_parts(file, len(names), file.parent / names[0])


def _in_parts(file: Path, count: int, first: Path) -> ModelError:
    return ModelError(
        f"{file}: one of {count} parts, and transformers reads no split GGUF. Join them with llama.cpp: "
        f"llama-gguf-split --merge {first} whole.gguf"
    )


def _refuse_other_formats(file: Path) -> None:
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        what = "an empty file" if not magic else f"not a GGUF file (it begins with {magic!r})"
        raise ModelError(f"{file}: {what}; copy it again, or name a checkpoint folder.")


def _examined(file: Path) -> Origin:
    """Read the header; return how the weights are stored and what they will become.

    Raises:
        ModelError: damaged, in parts, or of an architecture that transformers cannot read.
    """
    from gguf import GGUFReader

    try:
        reader = GGUFReader(file)
    except Exception as error:  # it parses bytes without checks: ValueError, IndexError, OverflowError, KeyError, …
        raise ModelError(
            f"{file}: truncated or damaged ({file.stat().st_size:,} bytes: {first_line(error)}); copy it again."
        ) from error
    architecture = _field(reader, "general.architecture")
    known = readable_architectures()
    if _plain(str(architecture)) not in {_plain(name) for name in known}:
        raise ModelError(
            f"{file}: transformers cannot read the architecture '{architecture}' from GGUF, only {', '.join(known)}. "
            "Open the original checkpoint instead."
        )
    if (parts := int(_field(reader, "split.count") or 1)) > 1:
        raise _in_parts(file, parts, file)
    weights = Counter[str]()
    for tensor in reader.tensors:
        weights[tensor.tensor_type.name] += int(tensor.n_elements)
    if not weights:
        raise ModelError(f"{file}: holds no weights, only a header; name the file of the model.")
    return Origin(
        file=str(file.resolve()),
        stored=weights.most_common(1)[0][0],
        dtype=_dtype_for(weights),
        licence=_field(reader, "general.license"),
        unread=_unread(reader, str(architecture)),
    )


def _unread(reader: Any, architecture: str) -> tuple[str, ...]:
    """List metadata on rotary positions in long texts that transformers ignores."""
    tensors = [tensor.name for tensor in reader.tensors if tensor.name.startswith("rope_")]
    key = f"{architecture}.rope.scaling.type"
    scaled = architecture != "gpt-oss" and _field(reader, key) not in (None, "none")
    return (*tensors, *[key] * scaled)


def _field(reader: Any, name: str) -> Any:
    found = reader.get_field(name)
    return None if found is None else found.contents()


def _plain(name: str) -> str:
    """Return one spelling for `gpt-oss` and `gpt_oss`."""
    return name.lower().replace("-", "").replace("_", "")


def _dtype_for(stored: Counter[str]) -> str:
    """Return the dtype that holds what the file holds: scales of quantised blocks are float16."""
    if set(stored) == {"F32"}:
        return "float32"
    return "bfloat16" if set(stored) <= {"F32", "BF16"} else "float16"


# Reading


def _reading(file: Path, kind: Any, **settings: Any) -> Any:
    """Let transformers read one thing from the file; its own bars and remarks are not shown."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            return kind.from_pretrained(file.parent, gguf_file=file.name, **settings)
    except Exception as error:  # parsers of the file raise whatever they meet: KeyError, struct.error, …
        raise ModelError(f"{file}: transformers cannot read it: {first_line(error)}") from error


def _convert(file: Path, shapes: Path, folder: Path) -> Origin:
    """Write the weights as safetensors; those too large for float16 as bfloat16.

    Raises:
        InputError: there is no room.
        ModelError: weights are missing, of another shape, or not finite.
    """
    origin = origin_of(shapes)
    assert origin is not None, "a described file has a record"
    for name in dict.fromkeys((origin.dtype, "bfloat16")):
        module = _module(file, shapes, DTYPES[name])
        if all(bool(torch.isfinite(parameter).all()) for parameter in module.parameters()):
            break
    else:
        raise ModelError(f"{file}: NaN or infinity in the weights; the file is damaged, copy it again.")
    needed = sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())
    try:
        require_room(folder, needed, "the dequantised weights; or set SECATEUR_CACHE")
        with contextlib.redirect_stderr(io.StringIO()):
            module.save_pretrained(folder)
    except (OSError, SafetensorError) as error:
        raise InputError(f"{folder.parent}: cannot hold the dequantised weights ({first_line(error)}).") from error
    return replace(origin, dtype=name)


def _module(file: Path, shapes: Path, dtype: torch.dtype) -> PreTrainedModel:
    from transformers import GgufConfig

    module, report = _reading(
        file,
        AutoModelForCausalLM,
        config=AutoConfig.from_pretrained(shapes),
        dtype=dtype,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        ignore_mismatched_sizes=True,
    )
    if report["mismatched_keys"]:
        name, found, expected = sorted(report["mismatched_keys"])[0]
        raise ModelError(f"{file}: {name} is {tuple(found)} but its header asks for {tuple(expected)}.")
    if report["missing_keys"]:
        raise ModelError(f"{file}: has no weights for {', '.join(sorted(report['missing_keys'])[:4])}.")
    for holder, name in ((module, "hf_quantizer"), (module.config, "quantization_config")):
        if hasattr(holder, name):
            delattr(holder, name)  # plain weights now, which may be saved
    return module


# The cache


def _cached(file: Path, what: str) -> Path:
    return cache_folder("gguf") / f"{_digest(file)}-{what}"


def _digest(file: Path) -> str:
    """Hash the size of a file, its ends, and pieces evenly spaced between them."""
    size = file.stat().st_size
    found = hashlib.sha256(str(size).encode())
    with file.open("rb") as stream:
        for number in range(_SAMPLES):
            stream.seek(max(0, (size - _SAMPLE_BYTES) * number // (_SAMPLES - 1)))
            found.update(stream.read(_SAMPLE_BYTES))
    return found.hexdigest()[:32]


def _write_record(folder: Path, origin: Origin) -> None:
    record = {"gguf": asdict(origin), "versions": versions()}
    replace_file(folder / RECORD, json.dumps(record, indent=1) + "\n")


def _keep_path(folder: Path, file: Path) -> None:
    """Record where the file is now, if it was moved since."""
    origin = origin_of(folder)
    if origin is not None and origin.file != str(file.resolve()):
        _write_record(folder, replace(origin, file=str(file.resolve())))
