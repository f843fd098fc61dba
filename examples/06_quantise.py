"""Quantise a pruned model to int8 with torchao (pip install 'secateur[torchao]'), save it and open it again."""

import tempfile
from pathlib import Path

import torch
from torchao.quantization import Int8WeightOnlyConfig
from transformers import AutoModelForCausalLM, TorchAoConfig

import secateur

folder = Path(tempfile.mkdtemp())
model = secateur.open_model("bundled")
secateur.save(
    secateur.prune(model, secateur.make_plan(model, method="sleb", blocks=2, texts="python-stdlib", windows=8)),
    folder / "cut",
)

plain = AutoModelForCausalLM.from_pretrained(folder / "cut", dtype="auto")
int8 = AutoModelForCausalLM.from_pretrained(
    folder / "cut", dtype="auto", quantization_config=TorchAoConfig(Int8WeightOnlyConfig())
)
int8.save_pretrained(folder / "int8")
again = AutoModelForCausalLM.from_pretrained(folder / "int8", dtype="auto")

assert model.tokenizer is not None
tokens = model.tokenizer("def add(a, b):\n    return", return_tensors="pt").input_ids
for name, candidate in {"pruned": plain, "int8": int8, "int8, opened again": again}.items():
    with torch.no_grad():
        loss = candidate(tokens, labels=tokens).loss
    print(f"{name}: loss {loss:.3f}")
for name in ("cut", "int8"):
    print(f"{name}: {sum(file.stat().st_size for file in (folder / name).glob('*.safetensors')):,} bytes of weights")
