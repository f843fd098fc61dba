"""Open a model: in memory, over several devices, or as a skeleton whose blocks are loaded on demand."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from secateur.errors import InputError, ModelError, SecateurWarning, first_line
from secateur.models import fingerprint
from secateur.models.anatomy import Family, is_tied, resolve, text_config
from secateur.models.decoder import Decoder
from secateur.models.detection import detect
from secateur.models.dtypes import DTYPES
from secateur.models.families import FAMILIES
from secateur.models.fetch import (
    HUB_NAME,
    fetch,
    has_all_weights,
    has_safetensors,
    local_folder,
    original_in_card,
    read_config,
    refuse_config,
    refuse_files,
)
from secateur.models.gguf import Origin, origin_of
from secateur.models.loading import empty_model, filled, whole_model
from secateur.models.placement import Placement
from secateur.models.quantised import (
    DTYPE,
    Quantisation,
    quantisation_of,
    without_quantisation,
)
from secateur.models.shard_files import holds_own_head, open_shard, shard_files, stored_tensors
from secateur.models.shards import Shards
from secateur.models.wrappers import after_images, auto_class, inside_wrapper, opens_alone
from secateur.reading import MIB, FileKind, from_json

_RECORD = FileKind(
    "record of secateur", 64 * MIB, error=ModelError, advice="Remove it to open the model without its history."
)


def open_model(
    source: str | Path | PreTrainedModel,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    skeleton: bool | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Decoder:
    """Open a causal language model for scoring and pruning.

    Args:
        source: a checkpoint folder, a hub name such as `Qwen/Qwen3-0.6B`, `bundled` for the small model that
            ships with the package, a GGUF file (or a folder or hub name with one in it: `owner/name/file.gguf`), or a
            transformers model already in memory.
        dtype: arithmetic: `float32`, `bfloat16`, `float16`, or `auto`: the checkpoint's own on a GPU, float32 on
            a CPU without fast bfloat16. The dtype a model is saved in does not change with it.
        device: `cpu`, `cuda`, `cuda:1`, `mps`; `auto` takes the available GPUs (all of them, if the model needs more
            than one), else the CPU. With several processes (`accelerate launch`) each takes one GPU.
        revision: branch, tag or commit on the hub.
        skeleton: load each block's weights on demand and release them afterwards. None decides by the free memory.
        tokenizer: a tokenizer to use instead of the checkpoint's: a folder, a hub name, or the object.
        trust_remote_code: allow code that comes with the checkpoint to run.
        allow_pickle: accept pickled weights, which can run code when loaded.

    A GGUF file is dequantised once, into the user's cache (`SECATEUR_CACHE`); FP8 and MXFP4 checkpoints are dequantised
    to bfloat16 whenever a block is read. A warning says so.

    Raises:
        InputError: the source, dtype or device does not exist.
        ModelError: the checkpoint is damaged, or not a decoder that can be pruned (the message says why).
    """
    if isinstance(source, PreTrainedModel):
        return _wrap(source, tokenizer, trust_remote_code=trust_remote_code)
    return _open(
        str(source),
        _Opening(dtype, device, revision, skeleton, tokenizer, trust_remote_code, allow_pickle),
        shapes_only=False,
    )


def open_shapes(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    skeleton: bool | None = None,
    tokenizer: str | PreTrainedTokenizerBase | None = None,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
) -> Decoder:
    """Open a model without reading its weights (unless pickled and available locally), to estimate what a job needs.

    On the hub they are not downloaded, and without them the fingerprint is empty. `by_blocks` of the decoder tells
    whether the job will read them block by block. Arguments and errors as for `open_model`.
    """
    opening = _Opening(dtype, device, revision, skeleton, tokenizer, trust_remote_code, allow_pickle)
    return _open(str(source), opening, shapes_only=True)


@dataclass(frozen=True)
class _Opening:
    """How a model is opened: the arguments of `open_model`."""

    dtype: str
    device: str
    revision: str | None
    skeleton: bool | None
    tokenizer: str | PreTrainedTokenizerBase | None
    trust_remote_code: bool
    allow_pickle: bool


@dataclass(frozen=True)
class _Checkpoint:
    """A checkpoint and what is known of its weights.

    Attributes:
        source: as given by the user.
        folder: where it lies.
        config: its configuration, of the weights as they will be read.
        family: its anatomy's.
        saved: dtype in which the model will be saved.
        quantised: how its weights are stored, if they have to be dequantised.
        here: whether its weights are on this machine.
    """

    source: str
    folder: Path
    config: Any
    family: Family
    saved: torch.dtype
    quantised: Quantisation | None
    here: bool

    @property
    def pickled(self) -> bool:
        return self.here and not has_safetensors(self.folder)

    def bytes_in(self, arithmetic: torch.dtype) -> float:
        """Return the bytes that its weights take in this arithmetic."""
        if self.quantised is not None:
            tensors = self.quantised.dequantised(stored_tensors(self.folder))
            return sum(math.prod(piece.get_shape()) for _, piece in tensors) * arithmetic.itemsize
        stored = sum(file.stat().st_size for file in shard_files(self.folder))
        return stored * arithmetic.itemsize / self.saved.itemsize

    def read_by_blocks(self, place: Placement, wanted: bool | None) -> bool | None:
        """Return whether the weights are to be read block by block; None if that is asked of what is not here.

        Raises:
            InputError: it is wanted, and the weights are pickled.
        """
        if wanted is None and self.here:
            room = place.first if self.quantised else place
            return not self.pickled and not room.holds(self.bytes_in(place.arithmetic))
        if wanted and self.pickled:
            raise InputError(f"{self.source}: a skeleton reads safetensors only; open this model without it.")
        return wanted

    def fingerprint(self, module: PreTrainedModel) -> str:
        if not self.here:
            return ""
        return fingerprint.of_module(module) if self.pickled else fingerprint.of_folder(self.folder)


def _open(source: str, asked: _Opening, *, shapes_only: bool) -> Decoder:
    trusted = asked.trust_remote_code
    folder = fetch(
        source,
        revision=asked.revision,
        weights=not shapes_only,
        trust_remote_code=trusted,
        allow_pickle=asked.allow_pickle,
    )
    origin = _said(origin_of(folder))
    here = not shapes_only or folder == local_folder(source) or has_all_weights(folder)
    if here:
        refuse_files(folder, allow_pickle=asked.allow_pickle)
    config = read_config(folder, source, trust_remote_code=trusted)
    quantised = _unquantised(config, source, folder)
    family = _family(config, source, trust_remote_code=trusted)
    tied = bool(getattr(config, "tie_word_embeddings", False))
    if tied and here and has_safetensors(folder) and holds_own_head(folder, family):
        _set_untied(config)
    saved = DTYPE if quantised else _saved_dtype(config, folder)
    checkpoint = _Checkpoint(source, folder, config, family, saved, quantised, here)
    place = Placement.of(asked.device, asked.dtype, saved)
    skeleton = checkpoint.read_by_blocks(place, asked.skeleton)
    thin = skeleton or (shapes_only and not checkpoint.pickled)
    if thin:
        module, shards = _thin(checkpoint, place, trust_remote_code=trusted)
    else:
        module, shards = _whole(checkpoint, place, trust_remote_code=trusted), None
    if skeleton is None:
        skeleton = not place.holds(module.num_parameters() * place.arithmetic.itemsize)
    _name_own_head(module, family)
    return Decoder(
        module=module.eval().requires_grad_(False),
        tokenizer=_tokenizer(asked.tokenizer or folder, trust_remote_code=trusted),
        anatomy=resolve(module, family),
        source=_shown(source),
        folder=folder,
        fingerprint=checkpoint.fingerprint(module),
        saved_dtype=saved,
        shards=shards,
        shapes_only=bool(thin) and not skeleton,
        for_estimate=shapes_only,
        other_tokenizer=asked.tokenizer is not None,
        history=history_of(folder),
        gguf=Path(origin.file) if origin is not None else None,
        quantised=quantised,
    )


def _thin(checkpoint: _Checkpoint, place: Placement, *, trust_remote_code: bool) -> tuple[PreTrainedModel, Shards]:
    """Return the model without weights, and what reads those of its blocks."""
    folder, family = checkpoint.folder, checkpoint.family
    module = empty_model(checkpoint.config, place.arithmetic, place.device, trust_remote_code=trust_remote_code)
    if not checkpoint.here:
        return module, Shards(folder, family.blocks, device=place.device)
    shards = Shards.of(folder, resolve(module, family), place.device, checkpoint.quantised)
    _refuse_other_numbers(folder, module, checkpoint.quantised)
    return module, shards


def _whole(checkpoint: _Checkpoint, place: Placement, *, trust_remote_code: bool) -> PreTrainedModel:
    """Return the model with all its weights in memory."""
    if checkpoint.quantised:
        return filled(*_thin(checkpoint, place, trust_remote_code=trust_remote_code))
    many, pickled = len(place.devices) > 1, checkpoint.pickled
    spread = many and (pickled or not place.first.holds(checkpoint.bytes_in(place.arithmetic)))
    module = whole_model(
        checkpoint.folder,
        checkpoint.config,
        place.arithmetic,
        "auto" if spread else place.device,
        trust_remote_code=trust_remote_code,
        pickled=pickled,
    )
    if not pickled:
        _refuse_other_numbers(checkpoint.folder, module, None)
    return module


_FLOATING = ("F64", "F32", "F16", "BF16")


def _refuse_other_numbers(folder: Path, module: PreTrainedModel, quantised: Quantisation | None) -> None:
    """Refuse weights that are no floating-point numbers: loading would convert them, and what they stand for is lost.

    Raises:
        ModelError: naming the first.
    """
    weights = {name for name, _ in module.named_parameters()}
    tensors = stored_tensors(folder)
    for name, piece in quantised.dequantised(tensors) if quantised else tensors:
        found = piece.get_dtype()
        if found not in _FLOATING and (name in weights or found.startswith("F8")):
            raise ModelError(
                f"{folder}: {name} is of type {found}, not a floating-point number, and nothing beside it says what it "
                "stands for; are the weights quantised? Prune the original checkpoint."
            )


def _unquantised(config: Any, source: str, folder: Path) -> Quantisation | None:
    """Take the quantisation out of a configuration, as the weights will be dequantised, and warn of it."""
    quantised = quantisation_of(config, source)
    if quantised is not None:
        warnings.warn(quantised.sentence(source, original_in_card(folder)), SecateurWarning, stacklevel=4)
        without_quantisation(config)
    return quantised


def _said(origin: Origin | None) -> Origin | None:
    """Warn of what was lost in converting a GGUF file."""
    sentence = origin.sentence() if origin is not None else None
    if sentence is not None:
        warnings.warn(sentence, SecateurWarning, stacklevel=4)
    return origin


def _shown(source: str) -> str:
    """Return a folder that looks like a name on the hub, `models/mine`, so that it is never taken for one."""
    return f"./{source}" if HUB_NAME.fullmatch(source) and Path(source).is_dir() else source


def history_of(folder: Path) -> tuple[dict[str, Any], ...]:
    """Return what secateur did to this checkpoint before, so that its history is kept when it is pruned again.

    Raises:
        ModelError: the record in the folder cannot be read.
    """
    record = folder / "secateur.json"
    if not record.is_file():
        return ()
    return _RECORD.parsed(record, lambda text: tuple(dict(entry) for entry in from_json(text).get("history", [])))


def _wrap(module: PreTrainedModel, tokenizer: Any, *, trust_remote_code: bool) -> Decoder:
    name = module.config.name_or_path or type(module).__name__
    if any(parameter.is_meta for parameter in module.parameters()):
        raise InputError(f"{name}: some of its weights are offloaded; give the folder instead, opened as a skeleton.")
    refuse_config(module.config, name)
    family = _family(module.config, name, trust_remote_code=trust_remote_code)
    _name_own_head(module, family)
    return Decoder(
        module=module.eval().requires_grad_(False),
        tokenizer=_tokenizer(tokenizer, trust_remote_code=trust_remote_code) if tokenizer is not None else None,
        anatomy=resolve(module, family),
        source=name,
        folder=None,
        fingerprint=fingerprint.of_module(module),
        saved_dtype=module.dtype,
    )


def _family(config: Any, source: str, *, trust_remote_code: bool) -> Family:
    text = text_config(config)
    if text.model_type not in FAMILIES and text is not config and not opens_alone(text):
        return after_images(detect(config, source, trust_remote_code=trust_remote_code), config)
    family = FAMILIES.get(text.model_type) or detect(text, source, trust_remote_code=trust_remote_code)
    if text is config:
        return family
    with torch.device("meta"):
        module = auto_class(config).from_config(config, trust_remote_code=trust_remote_code)
    return after_images(inside_wrapper(family, module), config)


def _name_own_head(module: PreTrainedModel, family: Family) -> None:
    """Let the configuration say that a head is not tied where it is not, as transformers unties it on loading."""
    if not is_tied(module, family):
        _set_untied(module.config)


def _set_untied(config: Any) -> None:
    for one in (config, text_config(config)):
        if getattr(one, "tie_word_embeddings", False):
            one.tie_word_embeddings = False


def _saved_dtype(config: Any, folder: Path) -> torch.dtype:
    """Return the checkpoint's dtype: that of the configuration, else that of the largest tensor."""
    if isinstance(config.dtype, torch.dtype):
        return config.dtype
    if isinstance(config.dtype, str) and config.dtype in DTYPES:
        return DTYPES[config.dtype]
    if not has_safetensors(folder):
        return torch.float32
    with open_shard(shard_files(folder)[0]) as handle:
        name = max(handle.keys(), key=lambda key: torch.Size(handle.get_slice(key).get_shape()).numel())
        stored = handle.get_slice(name).get_dtype()
    return {"BF16": torch.bfloat16, "F16": torch.float16}.get(stored, torch.float32)


def _tokenizer(source: Any, *, trust_remote_code: bool) -> PreTrainedTokenizerBase | None:
    if isinstance(source, PreTrainedTokenizerBase):
        return source
    folder = Path(source)
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "tokenizer_config.json")
    if folder.is_dir() and not any((folder / name).is_file() for name in names):
        return None
    try:
        found = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
        found("a")  # some settings are used, and found impossible, only then
        return found
    except BaseException as error:  # the tokenizers library raises nothing more specific, or panics
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise ModelError(f"{source}: the tokenizer cannot be read: {first_line(error)}") from error
