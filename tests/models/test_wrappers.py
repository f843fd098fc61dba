"""Multimodal wrappers: the text decoder is cut, and everything else stays as it was."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessor,
    Gemma4Config,
    Gemma4ImageProcessor,
    Llama4Config,
    Mistral3Config,
    PixtralImageProcessor,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3VLConfig,
)

from oracles import draw_tokens
from secateur import make_plan, open_model, prune, save
from secateur.data.windows import Windows
from secateur.errors import ModelError
from secateur.surgery.depth.blocks import keep_blocks

TEXT = {
    "vocab_size": 256,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
WRAPPERS = {
    "gemma3": lambda: Gemma3Config(
        text_config=TEXT, vision_config=VISION, mm_tokens_per_image=4, image_token_index=255
    ),
    "mistral3": lambda: Mistral3Config(
        text_config={**TEXT, "model_type": "mistral"},
        vision_config={**VISION, "model_type": "pixtral", "head_dim": 8, "image_size": 56},
        image_token_index=255,
    ),
}


PROCESSORS = {
    "gemma3": lambda: Gemma3ImageProcessor(size={"height": 28, "width": 28}),
    "mistral3": lambda: PixtralImageProcessor(size={"longest_edge": 56}, patch_size={"height": 14, "width": 14}),
}
"""How images are read; one takes the place of four tokens."""


IMAGE = 255
FURTHER = {
    "gemma4": lambda: Gemma4Config(
        text_config={
            **TEXT,
            "layer_types": ["sliding_attention", "full_attention"] * 3,
            "hidden_size_per_layer_input": 8,
            "vocab_size_per_layer_input": 256,
            "num_kv_shared_layers": 2,
        },
        vision_config={**VISION, "num_key_value_heads": 2, "head_dim": 8, "patch_size": 4},
        audio_config=None,
        image_token_id=IMAGE,
    ),
    "llama4": lambda: Llama4Config(
        text_config={**TEXT, "intermediate_size_mlp": 64, "num_local_experts": 4, "interleave_moe_layer_step": 2},
        vision_config={
            **VISION,
            "intermediate_size": 64,
            "projector_input_dim": 32,
            "projector_output_dim": 32,
            "vision_output_dim": 32,
        },
        image_token_index=IMAGE,
    ),
    "qwen3_vl": lambda: Qwen3VLConfig(
        text_config={**TEXT, "rope_parameters": ROPE},
        vision_config={**QWEN, "deepstack_visual_indexes": [0, 1]},
        image_token_id=IMAGE,
    ),
    "qwen3_5": lambda: Qwen3_5Config(
        text_config={
            **TEXT,
            "layer_types": ["linear_attention", "full_attention"] * 3,
            **{f"linear_num_{one}_heads": 2 for one in ("key", "value")},
            **{f"linear_{one}_head_dim": 8 for one in ("key", "value")},
            "rope_parameters": ROPE,
        },
        vision_config=QWEN,
        image_token_id=IMAGE,
    ),
}
ROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [2, 1, 1]}
QWEN = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "patch_size": 4, "out_hidden_size": 32}
QWEN_PROCESSOR = {"patch_size": 4, "merge_size": 2, "min_pixels": 64, "max_pixels": 256}
PIXELS = {
    "gemma4": lambda image: Gemma4ImageProcessor(patch_size=4, max_soft_tokens=70)([image], return_tensors="pt"),
    "llama4": lambda image: {"pixel_values": torch.tensor(image[:28, :28] / 255.0).float().permute(2, 0, 1)[None]},
    "qwen3_vl": lambda image: Qwen2VLImageProcessor(**QWEN_PROCESSOR)([image], return_tensors="pt"),
    "qwen3_5": lambda image: Qwen2VLImageProcessor(**QWEN_PROCESSOR)([image], return_tensors="pt"),
}
"""How images are read; the processor of Llama 4 needs torchvision."""
PLACES = {"gemma4": 64, "llama4": 1}


def drawn_image():
    return np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)


def image_and_text(model_type):
    """Return what the processor of a wrapper makes of an image, with text around the place it takes."""
    pixels = PROCESSORS[model_type]()(images=[drawn_image()], return_tensors="pt")
    tokens = draw_tokens(windows=1) % 250
    tokens[:, 1:5] = 255
    taken = {name: pixels[name] for name in ("pixel_values", "image_sizes") if name in pixels}
    return {"input_ids": tokens, **taken}


def a_larger_image_and_text(model_type):
    """Return the same for the wrappers below, which are told which tokens stand for the image."""
    pixels = dict(PIXELS[model_type](drawn_image()))
    tokens = torch.cat([draw_tokens(windows=1) % 250, draw_tokens(windows=1, positions=80) % 250], dim=1)
    tokens[:, 1 : 1 + PLACES.get(model_type, 4)] = IMAGE
    told = {} if model_type == "llama4" else {"mm_token_type_ids": (tokens == IMAGE).long()}
    pixels.pop("num_soft_tokens_per_image", None)
    return {"input_ids": tokens, **told, **pixels}


def saved(config, folder):
    torch.manual_seed(0)
    module = AutoModelForImageTextToText.from_config(config, dtype=torch.float32)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    module.save_pretrained(folder)


@torch.no_grad()
@pytest.mark.parametrize("model_type", FURTHER)
def test_blocks_and_channels_of_further_wrappers(model_type, tmp_path):
    saved(FURTHER[model_type](), tmp_path / "whole")
    decoder = open_model(tmp_path / "whole")
    plan = make_plan(decoder, method="last-n", blocks=2)
    cut = prune(decoder, plan)
    save(cut, tmp_path / "cut", check=False)
    dense, again = (AutoModelForImageTextToText.from_pretrained(tmp_path / one).eval() for one in ("whole", "cut"))
    for index in set(range(6)) - set(plan.kept_blocks()):
        block = dense.get_submodule(decoder.anatomy.family.blocks)[index]
        block.register_forward_hook(lambda _module, args, _output: args[0])
    text, seen = {"input_ids": draw_tokens() % 250}, a_larger_image_and_text(model_type)
    for given in (text, seen):
        expected = dense(**given, use_cache=False).logits
        torch.testing.assert_close(again(**given, use_cache=False).logits, expected, rtol=1e-5, atol=1e-5)
    blind = again(input_ids=seen["input_ids"]).logits
    assert not torch.allclose(blind, expected, atol=1e-3), "the image matters"

    windows = Windows.of(draw_tokens() % 250)
    plan = make_plan(cut, method="obs-width", settings={"ratio": 0.4, "heads": "never"}, texts=windows)
    narrow = prune(cut, plan, texts=windows)
    save(narrow, tmp_path / "narrow", check=False)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path / "narrow").eval()
    assert narrow.parameter_count == again.num_parameters() < cut.parameter_count
    torch.testing.assert_close(again(**text).logits, narrow.module(**text).logits, rtol=1e-5, atol=1e-5)


def test_blocks_after_which_features_of_an_image_are_added_stay(tmp_path):
    saved(FURTHER["qwen3_vl"](), tmp_path)
    with pytest.raises(ModelError, match="block 1 must stay: features of images are added after it"):
        keep_blocks(open_model(tmp_path), (0, 2, 3, 4, 5))


@pytest.fixture(params=WRAPPERS)
def folder(request, tmp_path):
    saved(WRAPPERS[request.param](), tmp_path / "whole")
    (tmp_path / "whole" / "preprocessor_config.json").write_text('{"size": 28}')
    return tmp_path / "whole"


@pytest.mark.parametrize("skeleton", [False, True])
def test_a_wrapper_is_cut_as_a_whole(folder, tmp_path, skeleton):
    decoder = open_model(folder, skeleton=skeleton)
    assert decoder.block_count == 6
    assert decoder.is_wrapped
    record = save(prune(decoder, make_plan(decoder, method="last-n", blocks=2)), tmp_path / "cut")
    assert record["check"]["passed"]
    assert record["check"]["original_difference"] < 1e-5
    dense, cut = (AutoModelForImageTextToText.from_pretrained(one).eval() for one in (folder, tmp_path / "cut"))
    assert type(cut) is type(dense)
    assert cut.config.text_config.num_hidden_layers == 4
    for index in (3, 4):
        dense.model.language_model.layers[index].register_forward_hook(lambda _module, args, _output: args[0])
    tokens = draw_tokens() % 250
    with torch.no_grad():
        expected = dense(input_ids=tokens, use_cache=False).logits
        torch.testing.assert_close(cut(input_ids=tokens).logits, expected, rtol=1e-5, atol=1e-5)
        seen = image_and_text(dense.config.model_type)
        expected = dense(**seen, use_cache=False).logits
        torch.testing.assert_close(cut(**seen).logits, expected, rtol=1e-5, atol=1e-5)
        blind = cut(input_ids=seen["input_ids"]).logits
        assert not torch.allclose(blind, expected, atol=1e-3), "the image matters"
    assert (tmp_path / "cut" / "preprocessor_config.json").read_text() == '{"size": 28}'
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "cut"))
    others = [name for name in before if "language_model" not in name]
    assert any("vision_tower" in name for name in others)
    assert all(torch.equal(before[name], after[name]) for name in others)


def test_a_wrapper_cannot_be_sliced(folder, tmp_path):
    decoder = open_model(folder)
    np.save(tmp_path / "windows.npy", draw_tokens().numpy())
    with pytest.raises(ModelError, match="multimodal wrapper"):
        make_plan(
            decoder, method="slicegpt", remove="10%", texts=tmp_path / "windows.npy", seq_len=draw_tokens().shape[1]
        )


@pytest.mark.parametrize("skeleton", [False, True])
def test_channels_and_heads_of_a_wrapper_are_pruned(folder, tmp_path, skeleton):
    decoder = open_model(folder, skeleton=skeleton)
    np.save(tmp_path / "windows.npy", (draw_tokens() % 250).numpy())
    texts = {"texts": tmp_path / "windows.npy", "seq_len": draw_tokens().shape[1]}
    plan = make_plan(decoder, method="obs-width", settings={"ffn": 32, "groups": 1}, **texts)
    record = save(prune(decoder, plan, texts=texts["texts"]), tmp_path / "cut")
    assert record["check"]["passed"]
    cut = AutoModelForImageTextToText.from_pretrained(tmp_path / "cut")
    assert cut.config.text_config.intermediate_size == 32
    assert cut.config.text_config.num_key_value_heads == 1
    before, after = (load_file(one / "model.safetensors") for one in (folder, tmp_path / "cut"))
    others = [name for name in before if "language_model" not in name]
    assert all(torch.equal(before[name], after[name]) for name in others)
    assert "AutoModelForImageTextToText.from_pretrained" in (tmp_path / "cut" / "README.md").read_text()
