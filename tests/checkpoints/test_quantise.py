"""Folders of ours are quantised by torchao through plain transformers, stock ones and those with a modelling file."""

import pytest
import torch
from transformers import AutoModelForCausalLM, TorchAoConfig

from secateur import make_plan, prune, save
from secateur.data.windows import Windows
from tiny_models import VOCABULARY

quantization = pytest.importorskip("torchao.quantization", reason="torchao is an extra: pip install secateur[torchao]")


@pytest.mark.parametrize(
    ("method", "amount", "settings"),
    [("last-n", {"blocks": 3}, {}), ("slicegpt", {"slice": "25%"}, {"rounding": 8})],
)
@torch.no_grad()
def test_int8_weights_of_a_pruned_folder(method, amount, settings, tiny, tmp_path):
    model = tiny("llama")
    tokens = torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(0))
    texts = Windows.of(tokens)
    plan = make_plan(model, method=method, texts=texts, settings=settings, **amount)
    save(prune(model, plan, texts=texts), tmp_path / "cut", check=False)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32)
    config = TorchAoConfig(quantization.Int8WeightOnlyConfig())
    int8 = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32, quantization_config=config)
    linears = [name for name, module in plain.named_modules() if isinstance(module, torch.nn.Linear)]
    quantised = [name for name in linears if type(int8.get_submodule(name).weight).__name__ == "Int8Tensor"]
    assert set(quantised) == set(linears) - {"lm_head"}
    expected, found = plain(tokens).logits, int8(tokens).logits
    assert not torch.equal(expected, found)
    assert (expected - found).norm() < 0.1 * expected.norm()
    int8.save_pretrained(tmp_path / "int8")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "int8", dtype=torch.float32)
    assert torch.equal(again(tokens).logits, found)
    written = [one.generate(tokens[:1, :4], max_new_tokens=4, do_sample=False) for one in (int8, again)]
    assert torch.equal(*written)
