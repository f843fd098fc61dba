"""Fewer blocks: what is in memory, what is saved, and what plain transformers loads are the walk without them."""

import functools
import json

import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles import draw_tokens, forward, no_real_parameters, pad, walk, walks
from secateur.errors import ModelError
from secateur.models.depth import _place_of, config_with_blocks, reason_to_keep
from secateur.models.families import FAMILIES
from secateur.models.opening import open_model
from secateur.surgery.depth.blocks import keep_blocks
from tiny_models import VARIANTS, build

GONE = (2, 5)
KEPT = (0, 1, 3, 4, 6, 7)
SKELETONS = (  # one of each way to name, fuse and list things
    "llama-tied",
    "qwen3-sliding",
    "gemma3_text",
    "smollm3",
    "opt-post-norm",
    "gpt2",
    "bloom",
    "falcon-new",
    "gpt_neox",
    "mixtral",
    "qwen3_moe-mixed",
    "qwen3_moe-step",
    "olmo3",
)
RESCALED = "gpt2-scaled"  # stock code derives the scale of attention from the number of the block


@pytest.mark.parametrize(
    ("placed", "expected"),
    [
        ({"model.layers.3": 1, "model.layers.30": 0}, 1),
        ({"model.layers": 1, "lm_head": 0}, 1),
        ({"model": 1, "lm_head": 0}, 1),
        ({"": 1}, 1),
    ],
)
def test_a_device_map_names_the_largest_modules_in_one_place(placed, expected):
    assert _place_of("model.layers.3", placed) == expected


@pytest.fixture(scope="module")
def shortened(tiny):
    """Return a tiny model without two of its blocks, cut once; not to be changed."""
    return functools.cache(lambda name: keep_blocks(tiny(name), KEPT))


def reloaded(module, folder):
    module.save_pretrained(folder)
    again, report = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    return again.eval()


def same(found, expected, name):
    if name == RESCALED:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", VARIANTS)
def test_without_blocks(name, tiny, shortened, tmp_path):
    decoder = tiny(name)
    tokens, mask = pad(draw_tokens(windows=2), "right")
    before = forward(build(name), tokens)
    config = decoder.config.to_json_string()
    unpadded, padded = walks(decoder, [(tokens, None), (tokens, mask)], without=GONE)
    assert (unpadded - before).abs().max() > 1e-3

    cut = shortened(name)
    again = reloaded(cut.module, tmp_path)
    for found in (forward(cut.module, tokens), forward(again, tokens), walk(cut, tokens)):
        same(found, unpadded, name)
    same(forward(again, tokens, mask)[mask], padded[mask], name)

    assert cut.block_count == again.config.num_hidden_layers == cut.config.num_hidden_layers == 6
    sizes = decoder.block_parameter_counts()
    assert cut.block_parameter_counts() == tuple(sizes[i] for i in KEPT)
    assert cut.parameter_count == again.num_parameters() == decoder.parameter_count - sum(sizes[i] for i in GONE)
    assert cut.fingerprint != decoder.fingerprint

    assert torch.equal(forward(decoder.module, tokens), before)
    assert decoder.config.to_json_string() == config
    assert decoder.block_count == len(decoder.block_list) == 8


@pytest.mark.parametrize(
    ("name", "gone", "kind"),
    [
        ("bamba", (1, 4, 7), "attention"),
        ("jamba", (1,), "attention"),
        ("lfm2_moe", (1, 4, 7), "attention"),
        ("nemotron_h", (2, 6), "attention"),
        ("nemotron_h", (0, 4), "linear_attention"),
    ],
)
def test_the_last_block_of_a_kind_of_mixing_stays(name, gone, kind, tiny):
    decoder = tiny(name, skeleton=True)
    config, family = decoder.config, decoder.anatomy.family
    assert reason_to_keep(config, family, gone) == f"the last block of the kind {kind} must stay"
    assert reason_to_keep(config, family, gone[:-1]) is None


@pytest.mark.parametrize("name", VARIANTS)
def test_the_shorter_model_shares_its_tensors(name, tiny, shortened):
    decoder, cut = tiny(name), shortened(name)
    old = {id(tensor) for tensor in (*decoder.module.parameters(), *decoder.module.buffers())}
    new = (*cut.module.named_parameters(), *cut.module.named_buffers())
    own = {n for n, tensor in new if id(tensor) not in old}
    packed = {name for name, _ in decoder.anatomy.family.packed}
    assert own == packed or (name == RESCALED and own and all("attn.c_attn" in n for n in own))
    tied = decoder.module.get_input_embeddings().weight is decoder.module.get_output_embeddings().weight
    assert tied == (cut.module.get_input_embeddings().weight is cut.module.get_output_embeddings().weight)
    assert not any(parameter.requires_grad for parameter in cut.module.parameters())
    assert not cut.module.training


TOLD_POSITIONS = ("bamba", "minimax")
"""transformers 5.23 counts the positions of new tokens from 0 here, unless it is told them, as `generate` does."""


@torch.no_grad()
@pytest.mark.parametrize("name", VARIANTS)
def test_the_shorter_model_continues_from_a_cache(name, shortened):
    module = shortened(name).module
    tokens = draw_tokens(windows=2, positions=14)
    whole = forward(module, tokens)
    cache = None
    found = []
    for first, last in ((0, 11), (11, 12), (12, 13), (13, 14)):
        told = {"position_ids": torch.arange(first, last).expand(2, -1)} if name in TOLD_POSITIONS else {}
        result = module(input_ids=tokens[:, first:last], past_key_values=cache, use_cache=True, **told)
        cache = result.past_key_values
        found.append(result.logits)
    torch.testing.assert_close(torch.cat(found, dim=1), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", SKELETONS)
def test_a_shorter_skeleton_reads_the_right_blocks(name, tiny):
    skeleton = tiny(name, skeleton=True)
    tokens = draw_tokens(windows=2, positions=12)
    cut = keep_blocks(skeleton, KEPT)
    assert no_real_parameters(cut.module)
    expected = walk(tiny(name), tokens, without=GONE)
    assert torch.equal(walk(cut, tokens), expected)
    assert no_real_parameters(cut.module)


@pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
def test_twice_shorter(skeleton, tiny):
    decoder = tiny("qwen3_moe-mixed", skeleton=skeleton)
    tokens = draw_tokens(windows=2)
    once = keep_blocks(decoder, KEPT)
    twice = keep_blocks(once, (1, 2, 5))
    for _ in range(2):
        assert torch.equal(walk(twice, tokens), walk(decoder, tokens, without=(0, 2, 4, 5, 6)))
        assert torch.equal(walk(once, tokens), walk(decoder, tokens, without=GONE))


@pytest.mark.parametrize("kept", [(7,), (0, 7), tuple(range(1, 8))])
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "smollm3", "qwen3-sliding", "qwen3_moe-step", "gpt2-scaled"])
def test_any_selection(name, kept, tiny, tmp_path):
    decoder = tiny(name)
    tokens = draw_tokens(windows=2)
    expected = walk(decoder, tokens, without=set(range(8)) - set(kept))
    same(forward(reloaded(keep_blocks(decoder, kept).module, tmp_path), tokens), expected, name)


def test_keeping_all_blocks_is_the_same_decoder(tiny):
    decoder = tiny("llama")
    assert keep_blocks(decoder, range(8)) is decoder


def test_keeping_none_is_refused(tiny):
    with pytest.raises(ModelError, match="no list of blocks"):
        keep_blocks(tiny("llama"), ())


def test_attention_scaled_by_depth_is_refused_for_a_skeleton(tiny):
    with pytest.raises(ModelError, match="without skeleton"):
        keep_blocks(tiny(RESCALED, skeleton=True), KEPT)


def test_rescaled_queries_leave_the_original_alone(tiny_folder):
    decoder = open_model(tiny_folder(RESCALED))
    before = {name: tensor.clone() for name, tensor in decoder.module.state_dict().items()}
    keep_blocks(decoder, KEPT)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.module.state_dict().items())


def test_the_attention_that_was_asked_for_stays():
    module = build("llama")
    module.set_attn_implementation("eager")
    cut = keep_blocks(open_model(module), KEPT)
    assert cut.config._attn_implementation == "eager"


def test_the_way_experts_are_computed_stays():
    """float64 has no grouped_mm, the default: it only runs where 'eager' was carried over."""
    decoder = open_model(build("qwen3_moe", dtype=torch.float64))
    tokens = draw_tokens(windows=2)
    assert torch.equal(forward(keep_blocks(decoder, KEPT).module, tokens), walk(decoder, tokens, without=GONE))


def test_the_dtype_stays(tiny_folder):
    decoder = open_model(tiny_folder("llama"), dtype="bfloat16")
    cut = keep_blocks(decoder, KEPT)
    assert {parameter.dtype for parameter in cut.module.parameters()} == {torch.bfloat16}
    assert cut.saved_dtype == torch.float32


def test_generation_settings_are_copied():
    module = build("llama")
    module.generation_config.temperature = 0.25
    cut = keep_blocks(open_model(module), KEPT)
    assert cut.module.generation_config.temperature == 0.25
    cut.module.generation_config.temperature = 0.5
    assert module.generation_config.temperature == 0.25


@pytest.mark.parametrize(
    ("name", "entry", "before", "after"),
    [
        ("smollm3", "no_rope_layers", [1, 0, 1, 1, 0, 1, 1, 0], [1, 0, 1, 0, 1, 0]),
        ("qwen3_moe-mixed", "mlp_only_layers", [1, 5], [1]),
        ("qwen3_moe-mixed", "decoder_sparse_step", 1, 1),
        ("qwen3_moe-step", "mlp_only_layers", [], [0, 3, 4]),
        ("qwen3_moe-step", "decoder_sparse_step", 2, 1),
        ("qwen3-sliding", "max_window_layers", 4, 3),
        ("gemma3_text", "layer_types", "wwfwwfww", "wwwwww"),
        ("gemma2", "layer_types", "wfwfwfwf", "wffwwf"),
        ("qwen2-sliding", "layer_types", "wwfwwfww", "wwwwww"),
    ],
)
def test_entries_per_block_follow_the_blocks(name, entry, before, after):
    config = VARIANTS[name].config(8)

    def shown(value):
        return (
            "".join("w" if kind == "sliding_attention" else "f" for kind in value) if entry == "layer_types" else value
        )

    assert shown(getattr(config, entry)) == before
    edited = config_with_blocks(config, FAMILIES[config.model_type], KEPT)
    assert shown(getattr(edited, entry)) == after
    assert edited.num_hidden_layers == 6
    assert shown(getattr(config, entry)) == before
    assert config.num_hidden_layers == 8


def test_the_saved_configuration_says_what_is_there(tiny, tmp_path):
    keep_blocks(tiny("smollm3"), KEPT).module.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["num_hidden_layers"] == 6
    assert saved["no_rope_layers"] == [1, 0, 1, 0, 1, 0]
