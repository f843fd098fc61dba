"""Peak memory of work on a 1.5 GB bf16 Llama opened as a skeleton, above the interpreter's own.

Names of works on the command line restrict it to these.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from common import keep, random_windows
from transformers import LlamaConfig, LlamaForCausalLM

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
    settings = {"ratio": 0.25} if sys.argv[3] == "obs-width" else {}
    amount = {} if settings else {"slice": 0.25}
    plan = secateur.make_plan(model, method=sys.argv[3], texts=windows, settings=settings, **amount)
    secateur.prune(model, plan)
print(before, highest())
"""


def build(folder: Path) -> int:
    """Write a random bf16 Llama of about 1.5 GB in several shards; returns its size in bytes."""
    import torch

    torch.manual_seed(0)
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
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder, max_shard_size="400MB")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def peak(*arguments: str) -> tuple[int, int]:
    """Run in a process of its own; returns resident bytes after the imports, and at the peak."""
    done = subprocess.run([sys.executable, "-c", PROGRAM, *arguments], capture_output=True, text=True, check=True)
    after_imports, highest = map(int, done.stdout.split())
    return after_imports, highest


def main(only: list[str], length: int = 512) -> None:
    """Measure the peaks of scoring, evaluating and slicing with 8 windows of 512, of width pruning with 2.

    What width pruning holds is Gram matrices, whose size does not depend on the windows; their products take the time.
    """
    import numpy as np

    with tempfile.TemporaryDirectory() as scratch:
        size = build(Path(scratch, "model"))
        works = {"score": 8, "eval": 8, "slicegpt": 8, "stock-slicing": 8, "obs-width": 2}
        for work, windows in works.items():
            if only and work not in only:
                continue
            file = Path(scratch, f"{windows}.npy")
            np.save(file, random_windows(windows, length).tokens.numpy())
            own, highest = peak(str(Path(scratch, "model")), str(file), work)
            found = {
                "checkpoint_mb": round(size / 1e6),
                "interpreter_mb": round(own / 1e6),
                "peak_mb": round(highest / 1e6),
                "above_interpreter": round((highest - own) / size, 3),
            }
            setting = {"work": work, "windows": windows, "seq_len": length, "width": 2048, "blocks": 12}
            keep("skeleton_memory", setting, found)


if __name__ == "__main__":
    main(sys.argv[1:])
