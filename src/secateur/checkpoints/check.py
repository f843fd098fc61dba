"""The check of a written folder: reopened by plain transformers in a fresh process, it must be the same model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch

from secateur.errors import CheckError
from secateur.models.decoder import Decoder
from secateur.models.forward import capture, logits, run_block
from secateur.ownership import scratch

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

    def job(self, folder: Path) -> dict[str, Any]:
        """Return the check of a folder as data for the fresh process."""
        return {
            "folder": str(folder),
            "expected": str(self.file),
            "dtype": str(self.dtype).removeprefix("torch."),
            "tolerance": self.tolerance,
            "trust_remote_code": self.trust_remote_code,
        }


@torch.no_grad()
def record_expected(decoder: Decoder, file: Path, stored: torch.dtype | None = None) -> Expected:
    """Write seeded random tokens and the decoder's logits for them, block by block for a skeleton.

    If the weights are saved in another dtype than before, the tolerance allows for the rounding.
    """
    positions = min(_POSITIONS, decoder.max_positions or _POSITIONS)
    generator = torch.Generator().manual_seed(0)
    vocabulary = min(decoder.module.get_input_embeddings().num_embeddings, int(decoder.config.vocab_size))
    tokens = torch.randint(0, vocabulary, (_WINDOWS, positions), generator=generator)
    placed = tokens.to(decoder.device)
    hidden, calls = capture(decoder, placed)
    for index, call in enumerate(calls):
        with decoder.block(index) as block:
            hidden = run_block(block, call, hidden)
    with decoder.outer():
        found = logits(decoder, hidden, placed)
    np.savez(file, tokens=tokens.numpy(), logits=found.float().cpu().numpy())
    arithmetic = _dtype_for_reopening(decoder)
    tolerance = TOLERANCE[arithmetic]
    if stored is not None and stored != decoder.saved_dtype:
        tolerance = max(tolerance, TOLERANCE[stored])
    return Expected(file, arithmetic, tolerance, trust_remote_code=decoder.has_own_code)


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
    if not result["passed"]:
        raise CheckError(
            "the written checkpoint behaves differently when reopened: "
            f"logits differ by {result['logit_difference']:.2e}, cached generation by {result['generation_gap']:.2e} "
            f"(relative), missing or unexpected weights: {result['wrong_keys'][:4] or 'none'}. Nothing was kept."
        )
