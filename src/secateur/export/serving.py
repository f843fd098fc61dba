"""Which engine runs a pruned model, with which command, and what to prune so that one does."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from secateur.checkpoints.save import layout_of
from secateur.errors import InputError, ModelError, unknown
from secateur.export.gguf_contents import layout_of as gguf_layout_of
from secateur.methods.method import find_method
from secateur.methods.sequence import names_in
from secateur.methods.uniform_widths import rounding_for
from secateur.models.decoder import Decoder
from secateur.models.widths import block_widths
from secateur.surgery.uneven import becomes_decilm, query_heads

Engine = Literal["vllm", "llama.cpp"]

ENGINES: tuple[Engine, ...] = ("vllm", "llama.cpp")

_OWN_BASIS = ("slicegpt", "dynamic-slicing")
"""Methods whose result changes its basis from block to block."""


def read_engine(name: str) -> Engine:
    """Return an engine by its name.

    Raises:
        InputError: an unknown one.
    """
    for engine in ENGINES:
        if name == engine:
            return engine
    raise unknown("engine", name, list(ENGINES))


def settings_for(
    engine: Engine | None, decoder: Decoder, spec: str, settings: dict[str, Any], tensor_parallel: int = 1
) -> dict[str, Any]:
    """Return a method's settings, restricted so that an engine runs the result.

    vLLM wants as many query heads in every block that has attention, so where blocks may differ the heads stay, or go
    all together (`allocation=global` with `attention=whole`) if the result is a Llama in the layout of Nemotron-NAS. It
    wants an output head that reads the whole hidden state. Split over processes, it wants numbers that they divide: the
    heads stay, and channels are rounded.

    Args:
        engine: the engine; None does not restrict.
        decoder: the model to be pruned.
        spec: a method or a sequence of them.
        settings: the settings given by name, which must not contradict.
        tensor_parallel: number of processes over which vLLM splits the model.

    Raises:
        InputError: the engine runs no result of this method, or a setting contradicts.
    """
    names, found = names_in(spec), dict(settings)
    for name in names:
        fields = find_method(name).settings.model_fields
        own = name if len(names) > 1 else None
        if name in _OWN_BASIS and engine == "llama.cpp":
            raise InputError(
                f"--for {engine}: it runs no residual stream that changes, as {name} makes it; use stock-slicing."
            )
        if name in _OWN_BASIS and engine == "vllm":
            _settle(found, own, "head", "whole", engine)
        whole = _named(found, own, "allocation") == "global" and becomes_decilm(decoder)
        uneven = (name == "flap" or "protect_first" in fields) and not whole
        if "heads" in fields and ((engine == "vllm" and uneven) or tensor_parallel > 1):
            _settle(found, own, "heads", "never", engine)
        elif engine == "vllm" and _named(found, own, "attention") == "groups":
            _settle(found, own, "attention", "whole", engine)
        if "rounding" in fields and "heads" in fields and tensor_parallel > 1:
            given = _named(found, own, "rounding")
            multiple = rounding_for(decoder, range(decoder.block_count), None if given is None else int(given))
            found[_key(own, "rounding")] = math.lcm(multiple, tensor_parallel)
    if engine == "vllm" and (reason := _against_splitting(decoder, tensor_parallel, heads_only=True)) is not None:
        raise InputError(f"{decoder.source}: {reason}.")
    return found


def _key(own: str | None, name: str) -> str:
    """Return the key of a setting, of one of several methods with its name."""
    return name if own is None else f"{own}.{name}"


def _named(settings: dict[str, Any], own: str | None, name: str) -> Any:
    return settings.get(_key(own, name))


def _settle(settings: dict[str, Any], own: str | None, name: str, value: str, engine: Engine | None) -> None:
    key = _key(own, name)
    if settings.get(key, value) != value:
        raise InputError(f"--for {engine}: needs {key}={value}, not {settings[key]}; leave it out.")
    settings[key] = value


def against(engine: Engine, decoder: Decoder, tensor_parallel: int = 1) -> str | None:
    """Return the reason why an engine does not run a model; None if it does."""
    if engine == "llama.cpp":
        try:
            gguf_layout_of(decoder)
        except ModelError as error:
            return str(error).removeprefix(f"{decoder.source}: ").rstrip(".")
        return None
    if layout_of(decoder) == "secateur":
        reason = _against_transformers_backend(decoder)
        if reason is not None:
            return f"vLLM does not run this model: {reason}"
    return _against_splitting(decoder, tensor_parallel)


def require_runs(engine: Engine | None, decoder: Decoder, tensor_parallel: int = 1) -> None:
    """Refuse a model that an engine does not run.

    Raises:
        InputError: with the reason.
    """
    reason = against(engine, decoder, tensor_parallel) if engine is not None else None
    if reason is not None:
        raise InputError(f"--for {engine}: {reason}. Nothing was written; use another method, or leave out --for.")


def _against_transformers_backend(decoder: Decoder) -> str | None:
    config = decoder.config
    heads = query_heads(config)
    if len({*zip(heads, config.key_value_heads, strict=True)}) > 1:
        return "its blocks have different numbers of heads"
    if config.widths and config.widths[-1] != config.hidden_size:
        return "its head reads fewer directions than its hidden size"
    if config.positions != "rope":
        return f"its positions are {config.positions}"
    return None


def _against_splitting(decoder: Decoder, processes: int, *, heads_only: bool = False) -> str | None:
    """Return the reason why a model cannot be split over so many processes."""
    if processes == 1 or decoder.anatomy.family.detected:
        return None
    for index in range(decoder.block_count):
        widths = block_widths(decoder, index)
        for count, what in ((widths.heads, "query heads"), (widths.channels, "channels")):
            if count % processes and not (heads_only and what == "channels"):
                return f"block {index} has {count} {what}, which {processes} processes do not divide"
        if widths.groups % processes and processes % widths.groups:
            return f"block {index} has {widths.groups} key/value heads, which {processes} processes do not share evenly"
    return None


def serving_lines(decoder: Decoder, folder: Path) -> Sequence[str]:
    """Return for each engine the command that runs a saved folder, or why none does."""
    return [_vllm_line(decoder, folder), _llama_cpp_line(decoder, folder)]


def _vllm_line(decoder: Decoder, folder: Path) -> str:
    if (reason := against("vllm", decoder)) is not None:
        return f"vLLM: {reason}"
    layout, more = layout_of(decoder), []
    if layout != "stock" or decoder.has_own_code:
        more.append("--trust-remote-code")
    if layout == "secateur" or (layout == "stock" and _head_size_unread(decoder)):
        more += ["--model-impl", "transformers"]
    return f"vLLM: {shlex.join(['vllm', 'serve', str(folder), *more])}"


def _head_size_unread(decoder: Decoder) -> bool:
    """Return whether vLLM's own implementation takes another head size than the configuration names: Qwen2's does."""
    if decoder.config.model_type != "qwen2":
        return False
    widths = block_widths(decoder, 0)
    return widths.heads * widths.head_size != decoder.hidden_size


def _llama_cpp_line(decoder: Decoder, folder: Path) -> str:
    if (reason := against("llama.cpp", decoder)) is not None:
        return f"llama.cpp: {reason.removeprefix('llama.cpp cannot run this model: ')}"
    return f"llama.cpp: {shlex.join(['secateur', 'export', str(folder), '-o', f'{folder}.gguf'])}"
