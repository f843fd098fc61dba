"""Multimodal wrappers: the text decoder is cut, and everything else stays as it was."""

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma3ImageProcessor,
    Mistral3Config,
    PixtralImageProcessor,
)

from oracles import draw_tokens
from secateur import make_plan, open_model, prune, save
from secateur.errors import ModelError

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


def image_and_text(model_type):
    """Return what the processor of a wrapper makes of an image, with text around the place it takes."""
    image = np.random.default_rng(0).integers(0, 256, (56, 56, 3), dtype=np.uint8)
    pixels = PROCESSORS[model_type]()(images=[image], return_tensors="pt")
    tokens = draw_tokens(windows=1) % 250
    tokens[:, 1:5] = 255
    taken = {name: pixels[name] for name in ("pixel_values", "image_sizes") if name in pixels}
    return {"input_ids": tokens, **taken}


@pytest.fixture(params=WRAPPERS)
def folder(request, tmp_path):
    torch.manual_seed(0)
    module = AutoModelForImageTextToText.from_config(WRAPPERS[request.param](), dtype=torch.float32)
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.normal_(std=parameter.shape[-1] ** -0.5)
    module.save_pretrained(tmp_path / "whole")
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
