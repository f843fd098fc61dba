"""Export a model as one GGUF file for llama.cpp, read back tensor by tensor and run beside transformers."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers.utils import is_gguf_available

from secateur.checkpoints.card import methods_in
from secateur.errors import InputError
from secateur.export.gguf_contents import layout_of, metadata, tensors
from secateur.export.gguf_file import PROVENANCE, TYPES, GgufFile, require_replaceable
from secateur.export.gguf_header import Entry, read_header
from secateur.export.gguf_layout import Layout
from secateur.export.gguf_vocabulary import (
    CONVERTER,
    vocabulary_by_converter,
    vocabulary_like,
    vocabulary_of,
)
from secateur.export.llama_cpp import Proof, find_quantiser, is_installed, prove, quantise, require_proved
from secateur.files import umask
from secateur.models.decoder import Decoder
from secateur.plan.plan import plans_in
from secateur.versions import versions

_STORED = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


@dataclass(frozen=True, kw_only=True)
class GgufOptions:
    """How a GGUF file is made.

    Attributes:
        kind: f32, f16, bf16 or q8_0, or a type of llama.cpp's quantiser such as q4_k_m; None keeps the stored dtype.
        like: a GGUF of the dense model, whose tokenizer and description are taken over.
        llama_cpp: a checkout of llama.cpp, for its converter's tokenizer and its quantiser.
        check: run the file in llama.cpp beside transformers, where a binding is installed.
        modelfile: write a Modelfile for Ollama beside it.
    """

    kind: str | None = None
    like: Path | None = None
    llama_cpp: Path | None = None
    check: bool = True
    modelfile: bool = False


@dataclass(frozen=True)
class Exported:
    """A written GGUF file.

    Attributes:
        file: its path.
        architecture: llama.cpp's name for what it holds.
        kind: the type of its matrices.
        bytes: its size.
        tensors: how many were written and read back.
        vocabulary: where the tokenizer came from.
        proof: the comparison in llama.cpp; None if it was not made.
        modelfile: the Modelfile beside it, if there is one.
    """

    file: Path
    architecture: str
    kind: str
    bytes: int
    tensors: int
    vocabulary: str
    proof: Proof | None
    modelfile: Path | None

    def as_dict(self) -> dict[str, Any]:
        """Return the record as data."""
        record = dataclasses.asdict(self)
        return {name: str(value) if isinstance(value, Path) else value for name, value in record.items()}


@dataclass(frozen=True)
class GgufExport:
    """A file that is known to be possible, with all that it takes except the weights."""

    decoder: Decoder
    out: Path
    options: GgufOptions
    layout: Layout
    kind: str
    quantiser: Path | None

    @classmethod
    def prepare(cls, decoder: Decoder, out: str | Path, options: GgufOptions) -> GgufExport:
        """Check what can be checked without reading weights.

        Raises:
            InputError: a package or the quantiser is missing, or the target must not be replaced.
            ModelError: llama.cpp cannot run this model.
        """
        if not is_gguf_available():
            raise InputError("writing GGUF files needs the package gguf: pip install 'secateur[gguf]'.")
        stored = _STORED[str(decoder.saved_dtype).removeprefix("torch.")]
        wanted = (options.kind or stored).lower()
        kind = wanted if wanted in TYPES else (stored if stored != "f32" else "f16")
        quantiser = None if wanted in TYPES else find_quantiser(options.llama_cpp)
        require_replaceable(Path(out))
        return cls(decoder, Path(out), dataclasses.replace(options, kind=wanted), layout_of(decoder), kind, quantiser)

    def run(self) -> Exported:
        """Write the file, read it back, run it, and move it into place.

        Raises:
            InputError: the tokenizer cannot be written.
            CheckError: it reads back, or computes, something else; nothing is left.
            NumericsError: a weight is NaN or infinite, or becomes so.
        """
        vocabulary, whence = self._vocabulary()
        target = self.out.resolve()
        with ExitStack() as stack:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=f".{target.name}.", dir=target.parent))
            except OSError as error:
                raise InputError(f"{target}: cannot be written ({error.strerror}).") from error
            file = Path(scratch, target.name)
            written = GgufFile(file, self.layout.name, self.kind)
            written.add_entries(self._described() | vocabulary)
            size = written.write(tensors(self.decoder, self.layout, shapes=True), tensors(self.decoder, self.layout))
            written.read_back()
            proof = prove(self.decoder, file) if self.options.check and is_installed() else None
            if proof is not None:
                require_proved(proof, self.kind)
            if self.quantiser is not None:
                assert self.options.kind is not None
                small = Path(scratch, f"quantised-{target.name}")
                quantise(self.quantiser, file, small, self.options.kind)
                file, size = small, small.stat().st_size
                proof = prove(self.decoder, file) if proof is not None else None
            file.chmod(0o666 & ~umask())
            file.replace(target)
        beside = self._modelfile(target) if self.options.modelfile else None
        return Exported(
            self.out, self.layout.name, str(self.options.kind), size, len(written.written), whence, proof, beside
        )

    def _vocabulary(self) -> tuple[dict[str, Entry], str]:
        options, decoder = self.options, self.decoder
        dense = options.like or decoder.gguf or _dense_file(decoder)
        if dense is not None and (options.like is not None or options.llama_cpp is None):
            if not dense.is_file():
                raise InputError(f"{dense}: no such file; name a GGUF of the dense model.")
            entries = vocabulary_like(read_header(dense).entries, decoder, dense)
            whence = f"from {dense}"
        elif options.llama_cpp is not None and (self.quantiser is None or (options.llama_cpp / CONVERTER).is_file()):
            if decoder.folder is None:
                raise InputError("the converter of llama.cpp reads a folder; save the model first.")
            entries = vocabulary_by_converter(decoder, decoder.folder, options.llama_cpp)
            whence = f"by the converter in {options.llama_cpp}"
        else:
            entries, whence = vocabulary_of(decoder), "from tokenizer.json"
        template = decoder.tokenizer.chat_template if decoder.tokenizer is not None else None
        if isinstance(template, str):
            entries["tokenizer.chat_template"] = Entry(template)
        return entries, whence

    def _described(self) -> dict[str, Entry]:
        decoder = self.decoder
        plans = plans_in(decoder.history)
        base = plans[0].model.source if plans else decoder.source
        provenance = {
            "secateur": versions()["secateur"],
            "base_model": base,
            "base_fingerprint": plans[0].model.fingerprint if plans else decoder.fingerprint,
            "fingerprint": decoder.fingerprint,
            "parameters_before": plans[0].parameters_before if plans else decoder.parameter_count,
            "parameters_after": decoder.parameter_count,
            "methods": methods_in(decoder.history),
        }
        entries: dict[str, Any] = {
            "general.type": "model",
            "general.name": _name(base, methods_in(decoder.history)),
            "general.size_label": _size_label(decoder.parameter_count),
            PROVENANCE: json.dumps(provenance),
        }
        return {name: Entry(value) for name, value in (entries | metadata(decoder, self.layout)).items()}

    def _modelfile(self, target: Path) -> Path:
        file = target.with_name("Modelfile")
        positions = min(self.decoder.max_positions or 4096, 4096)
        file.write_text(f"FROM ./{target.name}\nPARAMETER num_ctx {positions}\n", encoding="utf-8")
        return file


def export_gguf(model: Decoder, out: str | Path, options: GgufOptions | None = None) -> Exported:
    """Write a model as one GGUF file for llama.cpp.

    Every tensor is read back and compared. Where a binding of llama.cpp (`xllamacpp`) is installed, the file is also
    run: log-likelihoods of a text, and the tokens that follow it greedily, have to be those of transformers. Open the
    model with `dtype="float32"`, so that both compute with the same weights.

    Args:
        model: the open model, in memory or as a skeleton.
        out: the file; one that secateur wrote before is replaced, any other is refused.
        options: type, tokenizer, checks; None takes the defaults of `GgufOptions`.

    Raises:
        InputError: a package or the quantiser is missing, the tokenizer cannot be written, or the target must not be
            replaced.
        ModelError: llama.cpp cannot run this model.
        CheckError: the file reads back, or computes, something else; nothing is left.
        NumericsError: a weight is NaN or infinite, or becomes so.
    """
    return GgufExport.prepare(model, out, options or GgufOptions()).run()


def _dense_file(decoder: Decoder) -> Path | None:
    """Return the GGUF that the dense model was opened from, if it is still there."""
    plans = plans_in(decoder.history)
    source = Path(plans[0].model.source) if plans else None
    return source if source is not None and source.suffix.lower() == ".gguf" and source.is_file() else None


def _name(base: str, methods: list[str]) -> str:
    """Return a name for lists of models: the dense model's, and what was done to it."""
    short = Path(base).stem if base.endswith(".gguf") else base.rstrip("/").rpartition("/")[2]
    return f"{short} {' '.join(methods)}" if methods else short


def _size_label(parameters: int) -> str:
    for unit, letter in ((1e9, "B"), (1e6, "M"), (1e3, "K")):
        if parameters >= unit:
            return f"{parameters / unit:.3g}{letter}"
    return str(parameters)
