"""Reopen checkpoint folders in a separate process, without secateur, and compare with the expected logits.

Run as a script: `python -P fresh_process.py jobs.json`, where jobs.json lists `{folder, expected, dtype,
tolerance, trust_remote_code}`; `expected` is an .npz file with `tokens` and `logits`. Prints one
JSON object per folder.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, GenerationConfig
from transformers.utils import logging

NEW_TOKENS = 8


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """Load a folder with plain transformers; compare logits, and cached generation with uncached."""
    with np.load(job["expected"]) as data:
        tokens = torch.from_numpy(data["tokens"])
        expected = torch.from_numpy(data["logits"])
    model, report = AutoModelForCausalLM.from_pretrained(
        job["folder"],
        dtype=getattr(torch, job["dtype"]),
        output_loading_info=True,
        trust_remote_code=job.get("trust_remote_code", False),
    )
    model.eval()
    with torch.no_grad():
        found = model(input_ids=tokens, use_cache=False).logits.float()
        scale = float(expected.abs().max())
        difference = float((found - expected).abs().max()) / max(scale, 1e-12)
        generation = _generation_gap(model, tokens, scale)
    wrong_keys = sorted(report["missing_keys"]) + sorted(report["unexpected_keys"])
    return {
        "folder": job["folder"],
        "architecture": type(model).__name__,
        "stored_dtype": json.loads(Path(job["folder"], "config.json").read_text(encoding="utf-8")).get("dtype"),
        "parameters": sum(p.numel() for p in model.parameters()),
        "logit_difference": difference,
        "generation_gap": generation,
        "wrong_keys": wrong_keys,
        "without_secateur": "secateur" not in sys.modules,
        "passed": bool(
            not wrong_keys
            and np.isfinite(difference)
            and difference <= job["tolerance"]
            and generation <= job["tolerance"]
            and "secateur" not in sys.modules
        ),
    }


def _generation_gap(model: Any, tokens: torch.Tensor, scale: float) -> float:
    """Return how far cached greedy choices fall short of the best uncached logit, relative to the largest logit."""
    room = getattr(model.config, "max_position_embeddings", None) or tokens.shape[1] + NEW_TOKENS
    prompt = tokens[:1, : max(1, min(tokens.shape[1], room - NEW_TOKENS))]
    model.generation_config = GenerationConfig(pad_token_id=0)
    written = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
    )
    uncached = model(input_ids=written, use_cache=False).logits[0, prompt.shape[1] - 1 : -1].float()
    chosen = written[0, prompt.shape[1] :]
    best = uncached.max(dim=-1).values
    taken = uncached.gather(1, chosen[:, None])[:, 0]
    return float((best - taken).max()) / max(scale, 1e-12)


def _end_when_closed() -> None:
    """Wait until whoever started this process is gone, with their end of the pipe."""
    while os.read(sys.stdin.fileno(), 1):  # without the lock of `sys.stdin`, which would be missed at the end
        pass
    os._exit(1)


def main() -> None:
    """Run every check in the file named on the command line; the process ends when its standard input is closed."""
    threading.Thread(target=_end_when_closed, daemon=True).start()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    for job in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        print(json.dumps(examine(job)), flush=True)


if __name__ == "__main__":
    main()
