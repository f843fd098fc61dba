"""Which engine runs a result, what is pruned so that one does, and plans for other tools."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

import secateur
from secateur.checkpoints.save import layout_of
from secateur.errors import InputError
from secateur.export.gguf import GgufOptions, export_gguf
from secateur.export.plans import plan_as
from secateur.export.serving import against, require_runs, serving_lines, settings_for
from secateur.modeling import DeciLMConfig
from secateur.models.opening import open_model
from secateur.surgery.uneven import as_decilm, becomes_decilm

FOLDER = Path("cut")


@pytest.fixture(scope="module")
def bundled():
    return open_model("bundled", dtype="float32")


def cut(model, method, settings=None, **amount):
    texts = {"texts": "python-stdlib", "windows": 2, "seq_len": 64}
    return secateur.prune(model, secateur.make_plan(model, method=method, settings=settings, **texts, **amount))


@pytest.fixture(scope="module")
def uneven(bundled):
    return cut(bundled, "flap", settings_for("vllm", bundled, "flap", {}), remove=0.2)


@torch.no_grad()
def logits(model, tokens):
    return model(tokens, use_cache=False).logits


def test_uneven_channels_are_saved_as_decilm_and_open_everywhere(uneven, tmp_path):
    assert layout_of(uneven) == "decilm"
    record = secateur.save(uneven, tmp_path / "cut")
    assert record["check"]["architecture"] == "DeciLMForCausalLM"
    config = json.loads((tmp_path / "cut/config.json").read_text())
    assert (config["model_type"], config["rms_norm_eps"]) == ("nemotron-nas", 1e-6)
    widths = [block["ffn"]["intermediate_size"] for block in config["block_configs"]]
    assert len(set(widths)) > 1
    assert {block["attention"]["n_heads_in_group"] for block in config["block_configs"]} == {2}
    reopened = open_model(tmp_path / "cut", dtype="float32")
    tokens = torch.arange(5, 25)[None]
    assert torch.allclose(logits(reopened.module, tokens), logits(uneven.module, tokens), atol=1e-4)
    again = cut(reopened, "last-n", blocks=2)
    assert again.config.block_configs is not None
    secateur.save(again, tmp_path / "again")
    assert len(json.loads((tmp_path / "again/config.json").read_text())["block_configs"]) == 10


def test_a_skeleton_is_saved_as_decilm_too(bundled, tmp_path):
    thin = open_model("bundled", dtype="float32", skeleton=True)
    pruned = cut(thin, "flap", {"heads": "never"}, remove=0.2)
    assert secateur.save(pruned, tmp_path / "cut")["check"]["architecture"] == "DeciLMForCausalLM"


def test_absent_branches_and_the_layout_as_others_write_it(tmp_path):
    """Of Nemotron-NAS itself the MLPs are multiples of the hidden size, and branches may be absent."""
    attention, ffn = {"n_heads_in_group": 2, "no_op": False}, {"ffn_mult": 1.5, "no_op": False}
    absent = {"n_heads_in_group": None, "ffn_mult": None, "no_op": True}
    blocks = [
        {"attention": attention, "ffn": ffn},
        {"attention": absent, "ffn": ffn | {"ffn_mult": 3.0}},
        {"attention": attention, "ffn": absent},
    ]
    shapes = {"hidden_size": 256, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 64}
    config = AutoConfig.for_model("nemotron-nas", block_configs=blocks, **shapes)
    assert (config.intermediate_sizes, config.heads, config.key_value_heads) == ([256, 512, 0], [4, 0, 4], [2, 0, 2])
    model = AutoModelForCausalLM.from_config(config).eval()
    names = {name.removeprefix("model.layers.") for name, _ in model.named_parameters()}
    assert not any(name.startswith(("1.self_attn", "1.input_layernorm", "2.mlp")) for name in names)
    prompt = torch.arange(1, 9)[None]  # 0 is padding
    cached = model.generate(prompt, max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert torch.equal(logits(model, cached)[0, 7:-1].argmax(-1), cached[0, 8:])
    model.save_pretrained(tmp_path)
    assert isinstance(AutoConfig.from_pretrained(tmp_path), DeciLMConfig)
    replaced = attention | {"replace_with_linear": True}
    with pytest.raises(ValueError, match="linear layer in place"):
        AutoConfig.for_model("nemotron-nas", block_configs=[{"attention": replaced, "ffn": ffn}], **shapes)


def test_decilm_runs_in_llama_cpp(uneven, tmp_path):
    done = export_gguf(as_decilm(uneven), tmp_path / "cut.gguf", GgufOptions(kind="f32"))
    assert (done.architecture, done.proof.difference < 1e-4) == ("deci", True)


# Restrictions


def test_settings_that_an_engine_needs(bundled):
    assert settings_for(None, bundled, "flap", {"bias": "off"}) == {"bias": "off"}
    assert settings_for("vllm", bundled, "flap", {}) == {"heads": "never"}
    assert settings_for("vllm", bundled, "last-n:0.5,llm-pruner:0.5", {}) == {"llm-pruner.heads": "never"}
    whole = {"allocation": "global"}
    assert settings_for("vllm", bundled, "obs-width", whole) == whole, "attention goes as a whole, as DeciLM's may"
    assert settings_for("vllm", bundled, "obs-width", whole, tensor_parallel=3)["heads"] == "never"
    assert settings_for("vllm", bundled, "slicegpt", {}) == {"head": "whole"}
    with pytest.raises(InputError, match="--for vllm: needs attention=whole, not groups"):
        settings_for("vllm", bundled, "obs-width", whole | {"attention": "groups"})
    assert settings_for("llama.cpp", bundled, "flap", {}) == {}
    assert settings_for("vllm", bundled, "wanda-sp", {}, tensor_parallel=3) == {"heads": "never", "rounding": 192}
    with pytest.raises(InputError, match="--for vllm: needs heads=never, not even"):
        settings_for("vllm", bundled, "flap", {"heads": "even"})
    with pytest.raises(InputError, match=r"residual stream that changes, as slicegpt makes it; use stock-slicing"):
        settings_for("llama.cpp", bundled, "slicegpt", {})
    with pytest.raises(InputError, match="block 0 has 6 query heads, which 4 processes do not divide"):
        settings_for("vllm", bundled, "wanda-sp", {}, tensor_parallel=4)


@pytest.mark.parametrize(("family", "fits"), [("llama", True), ("gpt2", False), ("gemma2", False)])
def test_models_that_may_lose_attention_for_vllm(tiny, family, fits):
    assert becomes_decilm(tiny(family)) is fits
    expected = {"allocation": "global"} | ({} if fits else {"heads": "never"})
    assert settings_for("vllm", tiny(family), "obs-width", {"allocation": "global"}) == expected


def test_what_an_engine_does_not_run(bundled, uneven):
    heads = cut(bundled, "flap", remove=0.2)
    with pytest.raises(InputError, match=r"--for vllm: .*different numbers of heads\. Nothing was written"):
        require_runs("vllm", heads)
    assert against("llama.cpp", heads) is None
    assert serving_lines(heads, FOLDER)[1] == "llama.cpp: secateur export cut -o cut.gguf"
    sliced = cut(bundled, "slicegpt", remove=0.2)
    assert against("llama.cpp", sliced).endswith("its residual stream changes its width or basis")
    assert serving_lines(bundled, FOLDER)[0] == "vLLM: vllm serve cut"
    assert serving_lines(uneven, FOLDER)[0] == "vLLM: vllm serve cut --trust-remote-code"
    split = cut(bundled, "wanda-sp", settings_for("vllm", bundled, "wanda-sp", {}, 3), remove=0.2)
    assert against("vllm", split, 3) is None
    assert "which 5 processes do not divide" in against("vllm", split, 5)


# Plans for other tools


def test_plans_of_removed_blocks(bundled):
    plan = secateur.make_plan(bundled, method="last-n", blocks=3)
    merged = yaml.safe_load(plan_as(plan, "mergekit"))
    ranges = [part["sources"][0]["layer_range"] for part in merged["slices"]]
    assert ranges == [[0, 8], [11, 12]]
    assert tuple(block for low, high in ranges for block in range(low, high)) == plan.kept_blocks()
    assert merged["merge_method"] == "passthrough"
    assert "--prune-layers 8,9,10 " in plan_as(plan, "llama.cpp")
    width = secateur.make_plan(bundled, method="minitron-width", remove=0.1, texts="python-stdlib", windows=2)
    with pytest.raises(InputError, match=r"can only leave out blocks, and minitron-width does more"):
        plan_as(width, "mergekit")
    with pytest.raises(InputError, match="unknown tool 'awk'"):
        plan_as(plan, "awk")
