"""The large-model numbers in one command, for a machine with a GPU: seconds and peak memory from a cold skeleton.

    python benchmarks/gpu_profile.py [--shape 8b] [--windows 32] [--length 2048] [--work FOLDER] [--no-tests]

Writes a Llama of random weights in the shape of Llama-3.1-8B once (16 GB in bfloat16; it is deleted afterwards unless
`--work` names a folder), opens it as a skeleton anew for each job, with the operating system's cache of its files
emptied as far as that is allowed, and runs `score`, and plan and prune by `obs-width`, `swm` and `dynamic-slicing`.
Then the tests that need CUDA. `--shape tiny` does the same on a CPU in seconds.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from common import keep, peak
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

import secateur
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder

SHAPES: dict[str, dict[str, int]] = {
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 8192,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 8,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
        "max_position_embeddings": 2048,
    },
}
WANTED = {"score": 60, "obs-width": 360, "swm": 180, "dynamic-slicing": 300}
"""Seconds that each job should stay below at the shape `8b`."""
AMOUNTS: dict[str, dict[str, Any]] = {
    "obs-width": {"remove": 0.2},
    "swm": {"blocks": 3},
    "dynamic-slicing": {"slicing": 0.2},
}


def write(shape: str, folder: Path) -> None:
    """Write the checkpoint part by part, so that memory holds one block."""
    config = LlamaConfig(**SHAPES[shape], tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    folder.mkdir(parents=True, exist_ok=True)
    parts: dict[str, dict[str, torch.Size]] = {}
    for name, parameter in model.named_parameters():
        part = name.split(".")[2] if name.startswith("model.layers.") else "outer"
        parts.setdefault(part, {})[name] = parameter.shape
    places: dict[str, str] = {}
    draw = torch.Generator().manual_seed(0)
    for number, (part, shapes) in enumerate(parts.items(), 1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        tensors = {
            name: torch.ones(size, dtype=torch.bfloat16)
            if len(size) == 1
            else torch.empty(size, dtype=torch.bfloat16).normal_(std=0.02, generator=draw)
            for name, size in shapes.items()
        }
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file)
        print(f"wrote part {part}", flush=True)
    total = 2 * sum(size.numel() for shapes in parts.values() for size in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)


def forget_files(folder: Path) -> None:
    """Ask the operating system to read these files from the disk next time."""
    for file in folder.glob("*.safetensors"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def timed(folder: Path, device: str, job: Callable[[Decoder], Any]) -> dict[str, Any]:
    """Open the skeleton cold and run a job on it; seconds of both, and peak memory."""
    gc.collect()
    forget_files(folder)
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    model = secateur.open_model(folder, skeleton=True, device=device)
    job(model)
    if device == "cuda":
        torch.cuda.synchronize()
    found = {"seconds": round(time.perf_counter() - begin, 1), "peak_resident_bytes": peak()}
    return found | ({"peak_gpu_bytes": torch.cuda.max_memory_allocated()} if device == "cuda" else {})


def prune_by(method: str, windows: Windows) -> Callable[[Decoder], Any]:
    """Return the job that plans and prunes by a method."""

    def job(model: Decoder) -> None:
        plan = secateur.make_plan(model, method=method, texts=windows, **AMOUNTS[method])
        secateur.prune(model, plan, texts=windows)

    return job


def main() -> None:
    """Measure each job, then run the CUDA tests."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", choices=tuple(SHAPES), default="8b")
    parser.add_argument("--windows", type=int, default=32)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--jobs", nargs="*", choices=tuple(WANTED), default=tuple(WANTED))
    parser.add_argument("--no-tests", action="store_true")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with tempfile.TemporaryDirectory() as temporary:
        folder = (given.work or Path(temporary)) / f"llama-{given.shape}"
        if not (folder / "config.json").is_file():
            write(given.shape, folder)
        tokens = torch.randint(0, SHAPES[given.shape]["vocab_size"], (given.windows, given.length))
        windows = Windows.of(tokens)
        jobs = {name: prune_by(name, windows) for name in AMOUNTS}
        jobs["score"] = lambda model: secateur.score(model, texts=windows)
        for name in given.jobs:
            setting = {"job": name, "shape": given.shape, "windows": given.windows, "seq_len": given.length}
            where = torch.cuda.get_device_name() if device == "cuda" else "cpu"
            found = timed(folder, device, jobs[name])
            keep("gpu_profile", setting | {"device": where}, found | {"wanted_seconds": WANTED[name]})
    if not given.no_tests:
        tests = [sys.executable, "-m", "pytest", "-q", "-k", "cuda", str(Path(__file__).parents[1] / "tests")]
        sys.exit(subprocess.run(tests, check=False).returncode)


if __name__ == "__main__":
    main()
