"""llama.cpp on this machine: the proof that a file computes what its model does, and the quantiser."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from secateur.errors import CheckError, InputError
from secateur.models.decoder import Decoder
from secateur.models.forward import capture, logits, run_block

BINDING = "xllamacpp"

TOLERANCE = {"f32": 1e-3, "f16": 1e-3, "bf16": 5e-3, "q8_0": 2e-2}
"""Largest relative difference allowed in the mean log-likelihood, by the type of the file."""

_TEXT = (
    "The tree is pruned in winter, before the buds open; a clean cut above a healthy bud heals in a season.\n\n"
    "def remaining(heights: list[int], limit: int = 12) -> list[int]:\n"
    "    return [height for height in heights if height <= limit]\n"
)
_SCORED, _NEW, _LONGEST = 32, 16, 1280


@dataclass(frozen=True)
class Proof:
    """What llama.cpp computes for a text, beside transformers.

    Attributes:
        engine: the binding and its version.
        positions: tokens of the text.
        nll, nll_transformers: mean negative log-likelihood of its last tokens, in nats.
        greedy: how many of the tokens that follow (up to an end of text) transformers chooses too, and of how many.
        same_tokens: whether both split the text into the same tokens; None if the model has no tokenizer.
        window_crossed: whether the text is longer than the sliding window; None if the model has none.
    """

    engine: str
    positions: int
    nll: float
    nll_transformers: float
    greedy: tuple[int, int]
    same_tokens: bool | None
    window_crossed: bool | None

    @property
    def difference(self) -> float:
        """Relative difference of the log-likelihoods."""
        return abs(self.nll - self.nll_transformers) / max(abs(self.nll_transformers), 1e-9)

    def sentence(self) -> str:
        """Return the result in a line."""
        said = (
            f"llama.cpp ({self.engine}): negative log-likelihood {self.nll:.4f} against {self.nll_transformers:.4f} in "
            f"transformers, {self.greedy[0]} of {self.greedy[1]} greedy tokens the same"
        )
        if self.same_tokens is False:
            said += "; its tokenizer splits the text differently"
        if self.window_crossed is False:
            said += "; the text is shorter than the sliding window"
        return said


def is_installed() -> bool:
    """Return whether a binding of llama.cpp is installed."""
    return importlib.util.find_spec(BINDING) is not None


@torch.no_grad()
def prove(decoder: Decoder, file: Path) -> Proof:
    """Run a file in llama.cpp, and its model in transformers, on the same tokens.

    The model should be open in float32, in which its weights are compared.

    Raises:
        CheckError: llama.cpp cannot load or run the file.
    """
    tokens, text, window = _tokens(decoder)
    job = {"file": str(file), "tokens": tokens, "scored": _SCORED, "new": _NEW, "text": text}
    found = _run(job | {"threads": torch.get_num_threads()})
    chosen = torch.tensor(found["greedy"], dtype=torch.int64)
    everything = torch.tensor([tokens + found["greedy"]], device=decoder.device)
    computed = _last_logits(decoder, everything, _SCORED + len(chosen) + 1)
    places = [place for place, one in enumerate(found["log_likelihoods"]) if one is not None]
    scored = torch.tensor(tokens[-_SCORED:])[places]
    likelihoods = computed[:_SCORED][places].log_softmax(-1).gather(1, scored[:, None])
    return Proof(
        engine=found["engine"],
        positions=len(tokens),
        nll=-sum(found["log_likelihoods"][place] for place in places) / max(len(places), 1),
        nll_transformers=-float(likelihoods.mean()),
        greedy=(int((computed[_SCORED:-1].argmax(-1) == chosen).sum()), len(chosen)),
        same_tokens=None if decoder.tokenizer is None else found["text_tokens"] == decoder.tokenizer(text)["input_ids"],
        window_crossed=None if window is None else len(tokens) > window,
    )


def require_proved(proof: Proof, kind: str) -> None:
    """Raise if llama.cpp computes something else than transformers.

    Raises:
        CheckError: with both log-likelihoods.
    """
    if not proof.difference <= TOLERANCE[kind] or (kind == "f32" and proof.greedy[0] < proof.greedy[1]):
        raise CheckError(f"{proof.sentence()}. The file computes something else than the model; nothing was kept.")


def _tokens(decoder: Decoder) -> tuple[list[int], str, int | None]:
    """Return tokens to compare on, the text they come from, and the model's sliding window."""
    sliding = "sliding_attention" in (getattr(decoder.config, "layer_types", None) or ())
    window = int(decoder.config.sliding_window) if sliding else None
    wanted = 64 if window is None else window + _SCORED + _NEW
    longest = min(_LONGEST, (decoder.max_positions or _LONGEST) - _NEW)
    if decoder.tokenizer is not None:
        text = _TEXT
        while len(tokens := decoder.tokenizer(text)["input_ids"]) < min(wanted, longest):
            text += _TEXT
    else:
        text = ""
        count = int(decoder.module.get_input_embeddings().num_embeddings)
        tokens = torch.randint(0, count, (wanted,), generator=torch.Generator().manual_seed(0)).tolist()
    tokens = tokens[:longest] if window is not None else tokens[: min(longest, 64)]
    if len(tokens) <= _SCORED:
        raise CheckError(f"{decoder.source}: has too few positions ({longest}) to be compared in llama.cpp.")
    return [int(one) for one in tokens], text, window


def _last_logits(decoder: Decoder, tokens: torch.Tensor, count: int) -> torch.Tensor:
    """Return the logits of the last positions, (positions, vocabulary), in float32 on the CPU."""
    hidden, calls = capture(decoder, tokens)
    for index, call in enumerate(calls):
        with decoder.block(index) as block:
            hidden = run_block(block, call, hidden)
    with decoder.outer():
        return logits(decoder, hidden[:, -count:], tokens[:, -count:])[0].float().cpu()


def _run(job: dict[str, Any]) -> dict[str, Any]:
    script = Path(__file__).with_name("llama_cpp_process.py")
    with tempfile.TemporaryDirectory() as scratch:
        listed = Path(scratch, "job.json")
        listed.write_text(json.dumps(job), encoding="utf-8")
        done = subprocess.run(
            [sys.executable, "-P", str(script), str(listed)], capture_output=True, text=True, check=False
        )
    answer = next((line for line in done.stdout.splitlines() if line.startswith('{"log_likelihoods"')), None)
    if done.returncode != 0 or answer is None:
        lines = [line for line in done.stderr.splitlines() if "error" in line.lower() or "assert" in line.lower()]
        raise CheckError("llama.cpp cannot run the file:\n" + "\n".join((lines or done.stderr.splitlines())[-4:]))
    result: dict[str, Any] = json.loads(answer)
    return result


# The quantiser


def find_quantiser(llama_cpp: Path | None) -> Path:
    """Return llama.cpp's `llama-quantize`, in a build of the given checkout or on the PATH.

    Raises:
        InputError: there is none.
    """
    if llama_cpp is not None:
        places = [llama_cpp / place / "llama-quantize" for place in ("build/bin", "bin", "")]
        if (found := next(filter(os.path.isfile, places), None)) is not None:
            return found
    on_path = shutil.which("llama-quantize")
    if on_path is None:
        raise InputError(
            "this type needs llama.cpp's llama-quantize, which is neither on the PATH nor below --llama-cpp DIR. Write "
            "--type f16, and quantise it where llama.cpp is."
        )
    return Path(on_path)


def quantise(program: Path, source: Path, target: Path, kind: str) -> None:
    """Quantise a file.

    Raises:
        InputError: the program refused the type.
    """
    done = subprocess.run(
        [str(program), str(source), str(target), kind.upper()], capture_output=True, text=True, check=False
    )
    if done.returncode != 0 or not target.is_file():
        tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-3:])
        raise InputError(f"{program} could not make {kind}:\n{tail}")
