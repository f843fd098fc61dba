"""Reopen checkpoint folders in a separate process, without secateur, and compare with the expected logits.

Run as a script: `python -P fresh_process.py jobs.json`, where jobs.json lists `{folder, expected, dtype,
tolerance, trust_remote_code, auto_class, original}`; `expected` is an .npz file with `tokens` and `logits`. Prints one
JSON object per folder.

`original` is None, or `{folder, blocks, left_out, tolerance, dequantise}`: the folder the model was made from, whose
blocks `left_out` of the list at the path `blocks` are bypassed by hooks; its logits must be those of the checked
folder. With `expected` (a file as above) they must be those instead. `dequantise` names the dtype to which transformers
dequantises its weights, None if they are not quantised.
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
import transformers
from transformers import AutoConfig, GenerationConfig
from transformers.utils import logging

NEW_TOKENS = 8


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """Load a folder with plain transformers; compare logits, and cached generation with uncached."""
    with np.load(job["expected"]) as data:
        tokens = torch.from_numpy(data["tokens"])
        expected = torch.from_numpy(data["logits"])
    model, report = _auto_class(job).from_pretrained(
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
    parameters = sum(p.numel() for p in model.parameters())
    architecture = type(model).__name__
    del model
    original = _against_original(job, tokens, found)
    return {
        "folder": job["folder"],
        "architecture": architecture,
        "stored_dtype": json.loads(Path(job["folder"], "config.json").read_text(encoding="utf-8")).get("dtype"),
        "parameters": parameters,
        "logit_difference": difference,
        "generation_gap": generation,
        **original,
        "wrong_keys": wrong_keys,
        "without_secateur": "secateur" not in sys.modules,
        "passed": bool(
            not wrong_keys
            and np.isfinite(difference)
            and difference <= job["tolerance"]
            and generation <= job["tolerance"]
            and original.get("original_passed", True)
            and "secateur" not in sys.modules
        ),
    }


@torch.no_grad()
def _against_original(job: dict[str, Any], tokens: torch.Tensor, found: torch.Tensor) -> dict[str, Any]:
    """Compare with the original folder, read by plain transformers, in which the removed blocks pass on their input."""
    original = job.get("original")
    if original is None:
        return {}
    trusted = job.get("trust_remote_code", False)
    config = AutoConfig.from_pretrained(original["folder"], trust_remote_code=trusted)
    dequantised = original.get("dequantise")
    if dequantised:
        config.quantization_config = {**config.quantization_config, "dequantize": True}
    model = _auto_class(job).from_pretrained(
        original["folder"],
        config=config,
        dtype=getattr(torch, dequantised or job["dtype"]),
        trust_remote_code=trusted,
    )
    model = model.to(getattr(torch, job["dtype"])).eval()
    if "expected" in original:
        with np.load(original["expected"]) as data:
            tokens, found = torch.from_numpy(data["tokens"]), torch.from_numpy(data["logits"])
    blocks = model.get_submodule(original["blocks"])
    for index in original["left_out"]:
        blocks[index].register_forward_hook(_bypass, with_kwargs=True)
    truth = model(input_ids=tokens, use_cache=False).logits.float()
    difference = float((found - truth).abs().max()) / max(float(truth.abs().max()), 1e-12)
    return {
        "original_difference": difference,
        "original_passed": bool(np.isfinite(difference) and difference <= original["tolerance"]),
    }


def _bypass(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Return a block's input as its output."""
    hidden = args[0] if args else kwargs["hidden_states"]
    return (hidden, *output[1:]) if isinstance(output, tuple | list) else hidden


def _auto_class(job: dict[str, Any]) -> Any:
    return getattr(transformers, job.get("auto_class", "AutoModelForCausalLM"))


def _generation_gap(model: Any, tokens: torch.Tensor, scale: float) -> float:
    """Return how far cached greedy choices fall short of the best uncached logit, relative to the largest logit."""
    text = model.config.get_text_config(decoder=True)
    room = getattr(text, "max_position_embeddings", None) or tokens.shape[1] + NEW_TOKENS
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
