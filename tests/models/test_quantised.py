"""FP8 and MXFP4 checkpoints: dequantised while they are read, saved in bfloat16."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from oracles import draw_tokens, forward, walk
from secateur import make_plan, open_model, prune, save
from secateur.data.windows import Windows
from secateur.errors import ModelError, SecateurWarning
from secateur.models.opening import open_shapes
from secateur.models.quantised import from_fp8, from_mxfp4
from tiny_models import HIDDEN, VOCABULARY, build, save_tiny

MODES = pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
EVEN, UNEVEN = (8, 4), (20, 12)
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)


def edit_config(folder, **entries):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def quantised(weight, block):
    """Split a matrix into blocks, one after the other; return it in float8, its scales, and what they stand for."""
    packed = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
    meant = torch.empty(weight.shape)
    scales = torch.empty(-(-weight.shape[0] // block[0]), -(-weight.shape[1] // block[1]))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            where = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = weight[where].abs().max() / 448
            packed[where] = (weight[where] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[where] = packed[where].float() * scales[i, j]
    return packed, scales, meant.bfloat16()


def save_fp8(name, folder, block, **settings):
    """Save a tiny model in FP8; return the folder, and the same model with what its weights stand for."""
    dense = save_tiny(name, folder / "dense", blocks=4, dtype=torch.bfloat16, **settings)
    tensors, meant = load_file(dense / "model.safetensors"), {}
    for key, tensor in list(tensors.items()):
        if tensor.dim() == 2 and ".layers." in key and "mlp.gate.weight" not in key:
            tensors[key], tensors[f"{key}_scale_inv"], meant[key] = quantised(tensor.float(), block)
    exact = {key: tensor for key, tensor in tensors.items() if not key.endswith("_scale_inv")} | meant
    save_file(exact, dense / "model.safetensors", {"format": "pt"})
    packed = folder / "packed"
    packed.mkdir()
    (packed / "config.json").write_text((dense / "config.json").read_text())
    edit_config(packed, quantization_config={"quant_method": "fp8", "weight_block_size": list(block)})
    (packed / "README.md").write_text("---\nbase_model: owner/Original\n---\n")
    save_file(tensors, packed / "model.safetensors", {"format": "pt"})
    return packed, AutoModelForCausalLM.from_pretrained(dense, dtype=torch.float32).eval()


def save_mxfp4(folder):
    """Save a tiny gpt-oss with experts of random bytes; return the folder, and the same model in float32."""
    config = AutoConfig.for_model(
        "gpt_oss",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    module = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    module.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    module.float()
    for index, block in enumerate(module.model.layers):
        for name in ("gate_up_proj", "down_proj"):
            key = f"model.layers.{index}.mlp.experts.{name}"
            experts, columns, rows = tensors.pop(key).shape
            nibbles = torch.randint(0, 16, (experts, rows, columns // 32, 32))
            exponents = torch.randint(120, 126, (experts, rows, columns // 32))
            tensors[f"{key}_blocks"] = (nibbles[..., 0::2] + 16 * nibbles[..., 1::2]).to(torch.uint8)
            tensors[f"{key}_scales"] = exponents.to(torch.uint8)
            values = torch.tensor(E2M1)[nibbles] * 2.0 ** (exponents[..., None] - 127)
            getattr(block.mlp.experts, name).data = values.flatten(2).transpose(1, 2).contiguous()
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    edit_config(folder, quantization_config={"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]})
    return folder, module


@MODES
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
@pytest.mark.parametrize("block", [EVEN, UNEVEN], ids=["complete", "cut off"])
def test_fp8_is_dequantised_block_by_block(tmp_path, name, block, skeleton):
    folder, meant = save_fp8(name, tmp_path, block)
    said = rf"fp8 \(blocks of {block[0]} x {block[1]}\) dequantised to bfloat16; .* better \(owner/Original\)"
    with pytest.warns(SecateurWarning, match=said):
        decoder = open_model(folder, skeleton=skeleton)
    assert decoder.is_skeleton == skeleton
    assert decoder.saved_dtype == torch.bfloat16
    assert torch.equal(walk(decoder, draw_tokens()), forward(meant, draw_tokens()))


@MODES
def test_mxfp4_is_dequantised(tmp_path, skeleton):
    folder, meant = save_mxfp4(tmp_path)
    with pytest.warns(SecateurWarning, match="mxfp4 dequantised to bfloat16"):
        decoder = open_model(folder, skeleton=skeleton)
    assert torch.equal(walk(decoder, draw_tokens()), forward(meant, draw_tokens()))


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_a_cut_of_mxfp4_is_saved_in_bfloat16(tmp_path):
    decoder = open_model(save_mxfp4(tmp_path / "dense")[0])
    record = save(prune(decoder, make_plan(decoder, method="last-n", blocks=1)), tmp_path / "cut")
    assert record["check"]["original_difference"] < 1e-5
    assert {tensor.dtype for tensor in load_file(tmp_path / "cut" / "model.safetensors").values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@pytest.mark.parametrize(("name", "skeleton"), [("llama", False), ("qwen3_moe", True)])
def test_a_cut_of_fp8_is_saved_in_bfloat16(tmp_path, name, skeleton):
    folder, _ = save_fp8(name, tmp_path, EVEN)
    decoder, windows = open_model(folder, skeleton=skeleton), Windows.of(draw_tokens())
    for method, settings in (("last-n", {"blocks": 1}), ("obs-width", {"settings": {"ratio": 0.4, "heads": "never"}})):
        plan = make_plan(decoder, method=method, texts=windows, **settings)
        record = save(prune(decoder, plan, texts=windows), tmp_path / method)
        assert record["check"]["passed"]
        assert record["check"]["original_difference"] < 1e-5
        config = json.loads((tmp_path / method / "config.json").read_text())
        assert "quantization_config" not in config
        assert config["dtype"] == "bfloat16"
        tensors = load_file(tmp_path / method / "model.safetensors")
        assert not any(key.endswith("_scale_inv") for key in tensors)
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_blocks_that_transformers_cannot_read_are_not_compared_with_it(tmp_path):
    folder, meant = save_fp8("llama", tmp_path, UNEVEN)
    decoder = open_model(folder)
    record = save(prune(decoder, make_plan(decoder, method="last-n", blocks=0)), tmp_path / "cut")
    assert "original_difference" not in record["check"]
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    assert torch.equal(forward(again, draw_tokens()), forward(meant, draw_tokens()))


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
def test_the_memory_that_an_fp8_checkpoint_needs_is_that_of_its_dequantised_weights(tmp_path, monkeypatch):
    import psutil

    folder, meant = save_fp8("llama", tmp_path, EVEN)
    needed = 4 * sum(one.numel() for one in meant.parameters())
    for available, expected in ((needed / 0.69, False), (needed / 0.71, True)):
        free = psutil.virtual_memory()._replace(available=int(available))
        monkeypatch.setattr(psutil, "virtual_memory", lambda free=free: free)
        assert open_model(folder, dtype="float32").is_skeleton == expected
        assert open_shapes(folder, dtype="float32").by_blocks == expected


@pytest.mark.filterwarnings("ignore::secateur.errors.SecateurWarning")
@MODES
def test_numbers_that_nothing_explains_are_refused(tmp_path, skeleton):
    folder, _ = save_fp8("llama", tmp_path, EVEN)
    tensors = load_file(folder / "model.safetensors")
    scales = tensors.pop("model.layers.1.mlp.up_proj.weight_scale_inv")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"layers\.1\.mlp\.up_proj\.weight is of type F8_E4M3"):
        open_model(folder, skeleton=skeleton)
    tensors["model.layers.1.mlp.up_proj.weight_scale_inv"] = scales[:-1]
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelError, match=r"up_proj\.weight: scales of the shape \(5, 8\), where \(6, 8\) are expected"):
        walk(open_model(folder, skeleton=skeleton), draw_tokens())


@pytest.mark.parametrize("block", [[128], [0, 128], "128", [128.0, 128]])
def test_impossible_blocks_are_refused(tmp_path, block):
    folder, _ = save_fp8("llama", tmp_path, EVEN)
    edit_config(folder, quantization_config={"quant_method": "fp8", "weight_block_size": block})
    with pytest.raises(ModelError, match=r"weight_block_size in its config\.json must be two positive integers"):
        open_model(folder)


def test_a_model_that_transformers_holds_quantised_is_refused():
    module = build("llama", blocks=2)
    module.config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(ModelError, match=r"quantised \(fp8\)"):
        open_model(module)


def test_one_scale_for_a_tensor_and_scales_that_are_powers_of_two():
    weight = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).to(torch.float8_e4m3fn)
    assert torch.equal(from_fp8(weight, torch.tensor(0.5), None), (weight.float() / 2).bfloat16())
    exponents = torch.tensor([[127], [130]], dtype=torch.uint8)
    expected = torch.cat([weight[:3].float(), 8 * weight[3:].float()]).bfloat16()
    assert torch.equal(from_fp8(weight, exponents, (3, 4)), expected)
    both = torch.stack([weight.float(), weight.float()]).to(torch.float8_e4m3fn)
    experts = from_fp8(both, torch.stack([exponents, exponents]), (3, 4))
    assert torch.equal(experts, torch.stack([expected, expected]))
    with pytest.raises(ValueError, match="no block size"):
        from_fp8(weight, torch.ones(6), None)


def test_mxfp4_by_hand():
    packed = torch.zeros(1, 1, 1, 16, dtype=torch.uint8)
    packed[0, 0, 0, 0], packed[0, 0, 0, 1] = 0x72, 0x9F
    found = from_mxfp4(packed, torch.tensor([[[128]]], dtype=torch.uint8))
    assert found.shape == (1, 32, 1)
    assert found.flatten().tolist()[:4] == [2.0, 12.0, -12.0, -1.0]
