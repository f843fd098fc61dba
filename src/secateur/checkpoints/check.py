"""The check of a written folder: reopened by plain transformers in a fresh process, it must be the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from secateur.errors import CheckError, SecateurWarning
from secateur.models.decoder import Decoder
from secateur.models.fetch import has_safetensors
from secateur.models.fingerprint import of_folder
from secateur.models.forward import capture, logits, run_block
from secateur.models.opening import history_of, open_model
from secateur.models.shard_files import stored_tensors
from secateur.models.wrappers import auto_class
from secateur.ownership import scratch
from secateur.plan.plan import blocks_kept_by, plans_in
from secateur.plan.steps import DropBlocks
from secateur.surgery.depth.blocks import query_scaled_by_number

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference allowed, relative to the largest logit, by the dtype of the arithmetic."""

_WINDOWS, _POSITIONS = 2, 16


@dataclass(frozen=True)
class Expected:
    """Expected behaviour of a folder: a file with tokens and logits, the dtype of the arithmetic, and the tolerance."""

    file: Path
    dtype: torch.dtype
    tolerance: float
    trust_remote_code: bool = False
    auto_class: str = "AutoModelForCausalLM"
    """Name of the class of transformers that opens the folder."""
    original: dict[str, Any] | None = None
    """How plain transformers reads the original folder for comparison; see `fresh_process`."""

    def job(self, folder: Path) -> dict[str, Any]:
        """Return the check of a folder as data for the fresh process."""
        return {
            "folder": str(folder),
            "expected": str(self.file),
            "dtype": _name(self.dtype),
            "tolerance": self.tolerance,
            "trust_remote_code": self.trust_remote_code,
            "auto_class": self.auto_class,
            "original": self.original,
        }


@torch.no_grad()
def record_expected(decoder: Decoder, file: Path, stored: torch.dtype | None = None) -> Expected:
    """Write seeded random tokens and the decoder's logits for them, block by block for a skeleton.

    If the weights are saved in another dtype than before, the tolerance allows for the rounding.
    """
    tokens = _sample(decoder)
    found = _logits(decoder, tokens)
    np.savez(file, tokens=tokens.numpy(), logits=found.numpy())
    arithmetic = _dtype_for_reopening(decoder)
    tolerance = TOLERANCE[arithmetic]
    if stored is not None and stored != decoder.saved_dtype:
        tolerance = max(tolerance, TOLERANCE[stored])
    opens = auto_class(decoder.module.config).__name__
    return Expected(file, arithmetic, tolerance, trust_remote_code=decoder.has_own_code, auto_class=opens)


@torch.no_grad()
def with_original(expected: Expected, decoder: Decoder) -> Expected:
    """Let the fresh process also read the folder that the decoder was made from.

    The cut is then compared with what plain transformers makes of the original, so that a mistake in reading it here
    cannot confirm itself. If only blocks were removed, their outputs are bypassed there, and the result must be the
    logits of the cut. After any other edit of a skeleton, or of quantised weights, the dense model is read here once
    more, and must agree with the original as transformers reads it. Any other model in memory was read by transformers
    itself.
    """
    folder = decoder.folder
    if folder is None or not (folder / "config.json").is_file():
        return expected
    done = decoder.history[len(history_of(folder)) :]
    plans = plans_in(done)
    if not done and (not has_safetensors(folder) or decoder.fingerprint != of_folder(folder)):
        return expected  # edited by other means than a plan
    quantised = decoder.quantised
    if quantised is not None and not quantised.has_complete_blocks(stored_tensors(folder)):
        warnings.warn(
            f"{folder}: blocks of its FP8 weights are cut off at an edge, and plain transformers cannot read that; the "
            "result was compared with the weights as they are dequantised here, not with transformers' own reading.",
            SecateurWarning,
            stacklevel=2,
        )
        return expected
    original: dict[str, Any] = {
        "folder": str(folder),
        "blocks": decoder.anatomy.family.blocks,
        "left_out": [],
        "dequantise": _name(decoder.saved_dtype) if quantised else None,
    }
    if len(plans) == len(done) and all(type(step) is DropBlocks for plan in plans for step in plan.steps):
        kept = blocks_kept_by(done, decoder.block_count)
        count = len(plans[0].model.block_parameters) if plans else decoder.block_count
        original["left_out"] = [index for index in range(count) if index not in kept]
        rounded = query_scaled_by_number(decoder) is not None
        tolerance = max(expected.tolerance, TOLERANCE[decoder.saved_dtype]) if rounded else expected.tolerance
    elif decoder.is_skeleton or quantised:
        dense = open_model(
            folder,
            skeleton=True,
            device=str(decoder.device),
            dtype=_name(decoder.module.dtype),
            trust_remote_code=decoder.has_own_code,
        )
        original["expected"] = str(expected.file.with_name("original.npz"))
        tokens = _sample(dense)
        np.savez(original["expected"], tokens=tokens.numpy(), logits=_logits(dense, tokens).numpy())
        tolerance = expected.tolerance
    else:
        return expected
    return replace(expected, original={**original, "tolerance": tolerance})


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _sample(decoder: Decoder) -> torch.Tensor:
    positions = min(_POSITIONS, decoder.max_positions or _POSITIONS)
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(decoder.module.get_input_embeddings().num_embeddings, int(decoder.config.vocab_size))
    return torch.randint(0, vocabulary, (_WINDOWS, positions), generator=generator)


def _logits(decoder: Decoder, tokens: torch.Tensor) -> torch.Tensor:
    """Return logits for these tokens, computed block by block, in float32 on the CPU."""
    placed = tokens.to(decoder.device)
    hidden, calls = capture(decoder, placed)
    for index, call in enumerate(calls):
        with decoder.block(index) as block:
            hidden = run_block(block, call, hidden)
    with decoder.outer():
        return logits(decoder, hidden, placed).float().cpu()


def _dtype_for_reopening(decoder: Decoder) -> torch.dtype:
    """Return the dtype the expected logits were computed in, unless the whole model does not fit in memory in it."""
    arithmetic: torch.dtype = decoder.module.dtype
    needed = decoder.parameter_count * arithmetic.itemsize
    return decoder.saved_dtype if needed > 0.8 * psutil.virtual_memory().available else arithmetic


def reopen(jobs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Check folders in a fresh process that never imports secateur.

    Raises:
        CheckError: the process failed, for example because a folder cannot be loaded at all.
    """
    script = Path(__file__).with_name("fresh_process.py")
    with scratch("check") as place:
        listed = place / "jobs.json"
        listed.write_text(json.dumps(list(jobs)), encoding="utf-8")
        code, printed, said = _run([sys.executable, "-P", str(script), str(listed)])
    if code != 0:
        tail = "\n".join(said.strip().splitlines()[-5:])
        raise CheckError(f"the written checkpoint could not be reopened in a fresh process:\n{tail}")
    return [json.loads(line) for line in printed.splitlines() if line.startswith("{")]


def _run(command: list[str]) -> tuple[int, str, str]:
    """Run a process to its end, and return code, stdout and stderr; it ends with this one, whose pipe it reads."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    pipe = subprocess.PIPE
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8") as out,
        tempfile.TemporaryFile("w+", encoding="utf-8") as err,
        subprocess.Popen(command, stdin=pipe, stdout=out, stderr=err, env=environment) as process,
    ):
        try:
            code = process.wait()
        except BaseException:
            process.kill()
            raise
        for stream in (out, err):
            stream.seek(0)
        return code, out.read(), err.read()


def require_passed(result: dict[str, Any]) -> None:
    """Raise if a folder does not behave like the model it was written from.

    Raises:
        CheckError: with the differences.
    """
    original = result.get("original_difference")
    if original is not None and not result["original_passed"]:
        raise CheckError(
            f"the written checkpoint is not the original without what was removed: logits differ by {original:.2e} "
            "(relative) from those of the original folder, read by plain transformers. Were its weights or files "
            "changed after it was opened? Nothing was kept."
        )
    if not result["passed"]:
        raise CheckError(
            "the written checkpoint behaves differently when reopened: "
            f"logits differ by {result['logit_difference']:.2e}, cached generation by {result['generation_gap']:.2e} "
            f"(relative), missing or unexpected weights: {result['wrong_keys'][:4] or 'none'}. Nothing was kept."
        )
