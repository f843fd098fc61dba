"""What the benchmarks share: a random Llama, windows, interleaved timing, and where results are kept."""

from __future__ import annotations

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from secateur import Windows, open_model
from secateur.models.decoder import Decoder
from secateur.versions import versions

RESULTS = Path(__file__).parent / "results"


def random_llama(width: int = 768, blocks: int = 12, vocabulary: int = 8192) -> Decoder:
    """Build a Llama with random weights, seeded."""
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=vocabulary,
        max_position_embeddings=512,
    )
    return open_model(LlamaForCausalLM(config).eval())


def random_windows(count: int, length: int = 512, vocabulary: int = 8192) -> Windows:
    """Draw windows of random tokens, seeded."""
    return Windows.of(torch.randint(0, vocabulary, (count, length), generator=torch.Generator().manual_seed(0)))


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Time each of the runs `rounds` times, in turn (A B A B …), after one round that is not counted; seconds."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            begin = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - begin)
    return seconds


def compare(seconds: dict[str, list[float]], of: str, to: str) -> dict[str, float]:
    """Give medians, and the median of the round-by-round ratio of two of them."""
    ratios = [a / b for a, b in zip(seconds[of], seconds[to], strict=True)]
    return {
        f"{of}_seconds": round(statistics.median(seconds[of]), 3),
        f"{to}_seconds": round(statistics.median(seconds[to]), 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
    }


def keep(name: str, setting: dict[str, Any], found: dict[str, Any]) -> None:
    """Print one result and add it as a JSON line to `results/<name>.jsonl`."""
    record = {
        "benchmark": name,
        "date": datetime.now(UTC).date().isoformat(),
        "setting": setting,
        "found": found,
        "machine": {"cores": os.cpu_count(), "processor": platform.machine(), "threads": torch.get_num_threads()},
        "versions": versions(),
    }
    RESULTS.mkdir(exist_ok=True)
    with (RESULTS / f"{name}.jsonl").open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(record) + "\n")
    print(name, json.dumps(setting), json.dumps(found))
