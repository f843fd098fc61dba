"""What int8 weights (torchao) cost a pruned model: held-out perplexity and bytes, before and after.

Needs `pip install 'secateur[torchao]'`. The folders are opened by plain transformers in the dtype they are saved in.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch
from common import CODE, keep
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, PreTrainedModel, TorchAoConfig

import secateur
from secateur.data.texts import windows_for
from secateur.data.windows import Windows

CASES: list[tuple[str | None, dict[str, Any]]] = [
    (None, {}),
    ("sleb", {"blocks": 3}),
    ("obs-width", {"remove": 0.235}),
    ("stock-slicing", {"remove": 0.15}),
    ("slicegpt", {"remove": 0.25}),
]


def main(windows: int = 32) -> None:
    """Prune, save, quantise, and measure the same held-out windows before and after."""
    model = secateur.open_model("bundled")
    calibration = windows_for(model, CODE, windows=windows)
    held_out = windows_for(model, CODE, windows=64, split="held-out")
    for method, amount in CASES:
        with tempfile.TemporaryDirectory() as scratch:
            pruned, removed = model, 0.0
            if method is not None:
                plan = secateur.make_plan(model, method=method, texts=calibration, **amount)
                pruned, removed = secateur.prune(model, plan, texts=calibration), plan.removed_fraction
            before, after = Path(scratch, "cut"), Path(scratch, "int8")
            secateur.save(pruned, before, check=False)
            plain = AutoModelForCausalLM.from_pretrained(before, dtype="auto")
            int8 = AutoModelForCausalLM.from_pretrained(
                before, dtype="auto", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
            )
            int8.save_pretrained(after)
            keep(
                "quantise_table",
                {"method": method or "dense", **amount, "windows": windows, "dtype": "bfloat16"},
                {
                    "removed": round(removed, 4),
                    "perplexity": round(perplexity(plain, held_out), 2),
                    "int8": round(perplexity(int8, held_out), 2),
                    "bytes": weights_bytes(before),
                    "int8_bytes": weights_bytes(after),
                },
            )


@torch.no_grad()
def perplexity(model: PreTrainedModel, windows: Windows) -> float:
    """Measure a plain transformers model: exp of the mean loss over all windows, which are equally long."""
    losses = [model(batch, labels=batch).loss.float() for batch in windows.tokens.split(8)]
    return float(torch.exp(torch.stack(losses).mean()))


def weights_bytes(folder: Path) -> int:
    """Add up the safetensors files of a folder."""
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    main()
