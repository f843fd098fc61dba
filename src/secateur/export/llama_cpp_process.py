"""Run a GGUF file with llama.cpp in a process of its own, which an abort inside the library cannot take with it.

Run as a script: `python -P llama_cpp_process.py job.json`, where job.json holds `{file, tokens, scored, new, text,
threads}`.
Prints one JSON object: the log-likelihoods of the last `scored` tokens given those before (null where a token is no
whole character), at most `new` tokens that follow
greedily, and the tokens of the text.
"""

from __future__ import annotations

import json
import sys
import urllib.request
from pathlib import Path
from typing import Any

import xllamacpp

_FORCED = 1e6


def started(file: str, positions: int, threads: int) -> Any:
    """Load a file, with keys and values cached in float32 and without approximations of attention."""
    asked = xllamacpp.CommonParams()
    asked.model.path = file
    asked.n_ctx = positions
    asked.n_parallel = 1
    asked.n_gpu_layers = 0
    asked.cpuparams.n_threads = asked.cpuparams_batch.n_threads = threads
    asked.warmup = False
    asked.fit_params = False
    asked.swa_full = True
    asked.cache_type_k = asked.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    asked.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    return xllamacpp.Server(asked)


def asked_of(server: Any, path: str, question: dict[str, Any]) -> dict[str, Any]:
    """Return the server's answer to a question."""
    request = urllib.request.Request(
        f"{server.listening_address}/{path}",
        data=json.dumps(question).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request) as answer:
        found: dict[str, Any] = json.load(answer)
    return found


def log_likelihood(server: Any, tokens: list[int], place: int) -> float | None:
    """Return the log-likelihood of one token given those before; None for a token that is no whole character.

    The token is forced, and the likelihood is of the logits before that.
    """
    forced = {"n_predict": 1, "temperature": 0, "n_probs": 1, "logit_bias": [[tokens[place], _FORCED]]}
    found = asked_of(server, "completion", {"prompt": tokens[:place], **forced}).get("completion_probabilities")
    if not found:
        return None
    assert found[0]["id"] == tokens[place], "the forced token was not chosen"
    return float(found[0]["logprob"])


def examine(job: dict[str, Any]) -> dict[str, Any]:
    """Run one job."""
    tokens, new = job["tokens"], job["new"]
    server = started(job["file"], len(tokens) + new + 8, job["threads"])
    greedy = {"prompt": tokens, "n_predict": new, "temperature": 0, "return_tokens": True}
    return {
        "log_likelihoods": [
            log_likelihood(server, tokens, place) for place in range(len(tokens) - job["scored"], len(tokens))
        ],
        "greedy": asked_of(server, "completion", greedy)["tokens"],
        "text_tokens": asked_of(server, "tokenize", {"content": job["text"], "add_special": True})["tokens"],
        "engine": f"xllamacpp {xllamacpp.__version__}",
    }


if __name__ == "__main__":
    print(json.dumps(examine(json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")))), flush=True)
