"""Peak memory of work on a 1.5 GB bf16 Llama and an 8.5 GB mixture opened as skeletons, above the interpreter's own.

Names of works on the command line restrict it to these.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import keep, random_windows
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, Qwen3MoeConfig, Qwen3MoeForCausalLM

PROGRAM = """
import sys
import secateur

for name in secateur.__all__:  # torch and the rest are the interpreter's own
    getattr(secateur, name)

def highest():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))

before = highest()
model = secateur.open_model(sys.argv[1], skeleton=True)
windows = sys.argv[2]
if sys.argv[3] == "score":
    secateur.score(model, texts=windows)
elif sys.argv[3] == "eval":
    secateur.evaluate(model, texts=windows)
else:
    own = {"obs-width": {"ratio": 0.25}, "reap": {"experts": 32}, "ream": {"experts": 32}}
    settings = own.get(sys.argv[3], {})
    amount = {} if settings else {"slice": 0.25}
    plan = secateur.make_plan(model, method=sys.argv[3], texts=windows, settings=settings, **amount)
    secateur.prune(model, plan)
print(before, highest())
"""


def llama() -> PreTrainedModel:
    """Build a random bf16 Llama of about 1.5 GB."""
    config = LlamaConfig(
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=12,
        num_attention_heads=16,
        num_key_value_heads=16,
        vocab_size=32000,
        max_position_embeddings=512,
        dtype="bfloat16",
    )
    return LlamaForCausalLM._from_config(config, dtype=torch.bfloat16)


def mixture() -> PreTrainedModel:
    """Build a random bf16 Qwen3-MoE of about 8.5 GB, 64 experts in each of 40 blocks."""
    config = Qwen3MoeConfig(
        hidden_size=1024,
        moe_intermediate_size=512,
        num_experts=64,
        num_experts_per_tok=8,
        num_hidden_layers=40,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        vocab_size=32000,
        max_position_embeddings=512,
    )
    return Qwen3MoeForCausalLM._from_config(config, dtype=torch.bfloat16)


def build(folder: Path, make: Callable[[], PreTrainedModel]) -> int:
    """Write a random model in several shards; returns its size in bytes."""
    torch.manual_seed(0)
    make().save_pretrained(folder, max_shard_size="400MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak(*arguments: str) -> tuple[int, int]:
    """Run in a process of its own; returns resident bytes after the imports, and at the peak."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    after_imports, highest = map(int, done.stdout.split())
    return after_imports, highest


def main(only: list[str], length: int = 512) -> None:
    """Measure the peaks of scoring, evaluating and slicing with 8 windows of 512, of width pruning and experts with 2.

    What width pruning holds is Gram matrices, whose size does not depend on the windows; their products take the time.
    """
    llamas = {"score": 8, "eval": 8, "slicegpt": 8, "stock-slicing": 8, "obs-width": 2}
    measure(
        llama,
        {"width": 2048, "blocks": 12},
        {work: llamas[work] for work in llamas if not only or work in only},
        length,
    )
    mixtures = {"reap": 2, "ream": 2}
    shape = {"width": 1024, "blocks": 40, "experts": 64}
    measure(mixture, shape, {work: mixtures[work] for work in mixtures if not only or work in only}, length)


def measure(make: Callable[[], PreTrainedModel], shape: dict[str, int], works: dict[str, int], length: int) -> None:
    """Measure the peak of each of these works, given the number of windows of each."""
    with tempfile.TemporaryDirectory() as scratch:
        size = build(Path(scratch, "model"), make) if works else 0
        for work, windows in works.items():
            file = Path(scratch, f"{windows}.npy")
            np.save(file, random_windows(windows, length).tokens.numpy())
            own, highest = peak(str(Path(scratch, "model")), str(file), work)
            found = {
                "checkpoint_mb": round(size / 1e6),
                "interpreter_mb": round(own / 1e6),
                "peak_mb": round(highest / 1e6),
                "above_interpreter": round((highest - own) / size, 3),
                "peak": round(highest / size, 3),
            }
            keep("skeleton_memory", {"work": work, "windows": windows, "seq_len": length, **shape}, found)


if __name__ == "__main__":
    main(sys.argv[1:])
