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

from secateur import open_model
from secateur.data.texts import windows_for
from secateur.data.windows import Windows
from secateur.models.decoder import Decoder
from secateur.versions import versions

LENGTH, JUDGED = 512, 8
"""Tokens in a window, and windows of each text that judges a real model."""
CODE = "python-stdlib"
"""Code: one of the kinds that judge a real model, and what the bundled one was trained, calibrated and read on."""
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


def texts_that_judge(
    decoder: Decoder, wikitext: str, *, windows: int = JUDGED, seq_len: int = LENGTH
) -> dict[str, Windows]:
    """Read held-out windows of WikiText-2, which the default calibration has no part of, of prose, and of code."""
    named = {"wikitext": wikitext, "prose": "python-docs", "code": CODE}
    return {
        name: windows_for(decoder, source, windows=windows, seq_len=seq_len, split="held-out")
        for name, source in named.items()
    }


Times = dict[str, list[tuple[float, float]]]
"""Wall and processor seconds of each round, by run."""


def interleaved(runs: dict[str, Callable[[], Any]], rounds: int, *, warm: bool = True) -> Times:
    """Time each of the runs `rounds` times, in turn (A B A B …), with `warm` after one round that is not counted."""
    times: Times = {name: [] for name in runs}
    for number in range(not warm, rounds + 1):
        for name, run in runs.items():
            wall, processor = time.perf_counter(), time.process_time()
            run()
            if number:
                times[name].append((time.perf_counter() - wall, time.process_time() - processor))
    return times


def compare(times: Times, of: str, to: str) -> dict[str, float]:
    """Return medians, and the median of the round-by-round ratio, in wall and in processor seconds.

    On a machine shared with others the processor seconds are the steadier of the two.
    """
    found = {}
    for clock, kind in enumerate(("wall", "processor")):
        ratios = [a[clock] / b[clock] for a, b in zip(times[of], times[to], strict=True)]
        found |= {
            f"{of}_{kind}_s": round(statistics.median(t[clock] for t in times[of]), 2),
            f"{to}_{kind}_s": round(statistics.median(t[clock] for t in times[to]), 2),
            f"{kind}_ratio": round(statistics.median(ratios), 3),
            f"{kind}_ratio_range": f"{min(ratios):.2f}-{max(ratios):.2f}",
        }
    return found


def peak() -> int:
    """Return the peak resident bytes of this process; `getrusage` starts with those of the one that forked it."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])


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
