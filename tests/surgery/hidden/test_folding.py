"""A folded model is the stock model, number for number; what cannot be folded is refused with its reason."""

import dataclasses
import itertools
import math

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.bloom.modeling_bloom import build_alibi_tensor

from oracles import draw_tokens, forward, pad
from secateur.errors import ModelError
from secateur.modeling import SecateurConfig, SecateurForCausalLM
from secateur.models.anatomy import count_parameters
from secateur.models.opening import open_model
from secateur.surgery.hidden import invariance
from secateur.surgery.hidden.folding import (
    alibi_slopes,
    folded_block,
    folded_config,
    refuse_unsliceable,
    stream_sizes,
)
from secateur.surgery.hidden.invariance import _difference, require_invariance, rotation_error
from secateur.surgery.hidden.outer import folded_head, folded_tables
from tiny_models import AFTER_NORM, OTHER_FAMILIES, UNSLICEABLE, VARIANTS, build

BLOCKS = 4
SLICEABLE = [name for name in VARIANTS if name not in UNSLICEABLE]
QUERY_NORMS = {"cohere": {"use_qk_norm": True}, "stablelm": {"qk_layernorm": True}}

YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LONG = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "short_factor": [1.0, 1.5, 2.0, 2.5],
    "long_factor": [2.0, 3.0, 4.0, 5.0],
    "original_max_position_embeddings": 12,
    "partial_rotary_factor": 1.0,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}


@pytest.fixture(scope="module")
def small(tiny):
    """Return a tiny model of a few blocks; not to be changed."""
    return lambda name, **settings: tiny(name, blocks=BLOCKS, **settings)


def varied(name, **changes):
    """A tiny model of a variant whose configuration differs in these entries."""
    row = VARIANTS[name]

    def config(blocks):
        changed = row.config(blocks)
        for key, value in changes.items():
            assert getattr(changed, key) != value
            setattr(changed, key, value)
        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, name, dataclasses.replace(row, config=config))
        return open_model(build(name, blocks=2))


@torch.no_grad()
def folded(decoder):
    """The folded model, every parameter of which was given a value."""
    module = SecateurForCausalLM(folded_config(decoder)).eval()
    weights = folded_tables(decoder) | folded_head(decoder)
    for index in range(decoder.block_count):
        weights |= {f"model.layers.{index}.{name}": one for name, one in folded_block(decoder, index).items()}
    module.load_state_dict(weights, strict=True)
    return module


def assert_same_logits(found, decoder, tokens, mask, allowed=1e-5):
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    expected = forward(decoder.module, tokens, mask)[real]
    assert float((forward(found, tokens, mask)[real] - expected).abs().max() / expected.abs().max()) < allowed


@pytest.mark.parametrize("name", SLICEABLE)
def test_folding_leaves_the_logits_alone(name, small):
    decoder = small(name)
    module = folded(decoder)
    for side in (None, "left"):
        assert_same_logits(module, decoder, *pad(draw_tokens(), side))


@pytest.mark.parametrize("name", QUERY_NORMS)
def test_norms_of_queries_and_keys_are_folded(name):
    decoder = varied(name, **QUERY_NORMS[name])
    config = folded_config(decoder)
    assert (config.qk_norm, config.qk_norm_per_head) == ("layernorm", True)
    for side in (None, "left"):
        assert_same_logits(folded(decoder), decoder, *pad(draw_tokens(), side))
    assert rotation_error(decoder) < 1e-5


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("olmo", {"clip_qkv": 0.5}),
        ("qwen3_moe", {"norm_topk_prob": False}),
        ("mixtral", {"num_experts_per_tok": 1}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0}}),
        ("gpt2", {"scale_attn_weights": False}),
        ("opt", {"enable_bias": False}),
        ("opt", {"layer_norm_elementwise_affine": False}),
        ("gpt_neox", {"attention_bias": False}),
        ("gpt_neox", {"layer_norm_eps": 0.1}),
        ("phi3", {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}}),
        ("phi3", {"rope_parameters": LONG}),
        ("qwen3", {"rope_parameters": YARN}),
        ("llama", {"rope_parameters": LLAMA3}),
        ("gemma", {"hidden_act": "relu"}),
    ],
    ids=lambda value: value if isinstance(value, str) else next(iter(value)),
)
def test_settings_that_change_the_model_are_folded(name, changes):
    decoder = varied(name, **changes)
    assert_same_logits(folded(decoder), decoder, *pad(draw_tokens(), "left"))


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        *((name, "norm stands between its branches and the residual stream") for name in AFTER_NORM),
        ("opt-post-norm", "norms stand on the residual stream"),
        ("secateur", r"already in secateur.s own form"),
        ("ministral3", "scaled by their positions"),
        ("nemotron", "add 1 to their scales"),
        ("hunyuan_v1_dense", "normed after their rotation"),
        ("cohere2", "only its sliding attention has rotary positions"),
        *((name, "not among the families known exactly") for name in OTHER_FAMILIES),
    ],
)
def test_a_refusal_names_its_reason(name, reason, small):
    decoder = small(name, skeleton=True)
    for refused in (refuse_unsliceable, folded_config, require_invariance):
        with pytest.raises(ModelError, match=f"cannot be sliced: .*{reason}"):
            refused(decoder)


@pytest.mark.parametrize(
    ("name", "changes", "reason"),
    [
        ("bloom", {"apply_residual_connection_post_layernorm": True}, "residual is taken after the norm"),
        ("phi", {"qk_layernorm": True}, "query and key norms have biases"),
        ("opt", {"word_embed_proj_dim": 24}, "projections stand between its embeddings and its blocks"),
    ],
)
def test_a_refused_setting_names_its_reason(name, changes, reason):
    with pytest.raises(ModelError, match=reason):
        refuse_unsliceable(varied(name, **changes))


def test_a_kind_of_attention_that_is_not_known_is_refused():
    decoder = varied("llama")
    decoder.config.layer_types = ["full_attention", "chunked_attention"]
    with pytest.raises(ModelError, match="blocks of the kind chunked_attention"):
        refuse_unsliceable(decoder)


@pytest.mark.parametrize("name", SLICEABLE)
def test_sizes_on_the_stream_are_the_true_parameter_counts(name, small):
    config = folded_config(small(name, skeleton=True))
    points = (1 if config.parallel else 2) * BLOCKS + 1
    plain = [32] * points
    uneven = list(itertools.islice(itertools.cycle([24, 16, 8, 32, 8]), points))
    for widths, shortcuts in ((plain, [False] * (points - 1)), (uneven, [True] * (points - 1))):
        config.widths, config.shortcuts = widths, shortcuts
        with torch.device("meta"):
            module = SecateurForCausalLM(config)
        sizes = stream_sizes(config).sizes_at(widths, shortcuts)
        assert sizes.blocks == tuple(map(count_parameters, module.model.layers))
        assert sizes.total == count_parameters(module)


def test_sizes_with_norms_over_heads_are_the_true_parameter_counts():
    config = folded_config(varied("cohere", use_qk_norm=True))
    with torch.device("meta"):
        module = SecateurForCausalLM(config)
    assert stream_sizes(config).sizes_at(config.widths, config.shortcuts).total == count_parameters(module)


@pytest.mark.parametrize("heads", [4, 6, 8, 12])
def test_slopes_are_those_of_transformers(heads):
    stock = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
    torch.testing.assert_close(torch.tensor(alibi_slopes(heads)), stock, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", SLICEABLE)
def test_rotation_leaves_the_logits_alone(name, small):
    assert rotation_error(small(name)) < 1e-5


def test_rotation_of_a_skeleton_is_the_same(small):
    assert rotation_error(small("llama", skeleton=True)) == pytest.approx(rotation_error(small("llama")), abs=1e-7)


@pytest.mark.parametrize(
    ("name", "row"),
    [
        ("llama", {"norm": "rms-plus-one"}),
        ("gemma", {"norm": "rms"}),
        ("opt", {"norm": "rms"}),
        ("gpt_neox", {"qkv": "stacked"}),
        ("cohere", {"positions": "rope"}),
        ("granite", {"residual_multiplier": None}),
        ("granite", {"embedding_multiplier": None}),
        ("granite", {"logits_divisor": None}),
        ("falcon-rw", {"alibi_scaled": False}),
    ],
)
def test_a_wrong_family_row_is_noticed_before_any_cut(name, row, small):
    decoder = small(name)
    broken = dataclasses.replace(decoder.anatomy, family=dataclasses.replace(decoder.anatomy.family, **row))
    with pytest.raises(ModelError, match=r"rotating the hidden states changes the logits by .*Nothing was cut"):
        require_invariance(dataclasses.replace(decoder, anatomy=broken))
    require_invariance(decoder)


def test_an_error_in_a_block_is_seen_through_those_after_it(tiny, monkeypatch):
    """Of eight blocks three are rotated; the others pass on what differs."""
    decoder = tiny("llama", blocks=8)
    rotated, rotate = set(), invariance._through_block

    def spoiled(assembly, index, turns, calls, states):
        rotated.add(index)
        expected, found = rotate(assembly, index, turns, calls, states)
        return expected, found * (1.1 if index == 0 else 1.0)

    assert rotation_error(decoder) < 1e-5
    monkeypatch.setattr(invariance, "_through_block", spoiled)
    assert rotation_error(decoder) > 1e-2
    assert rotated == {0, 4, 7}


def test_weights_that_are_not_finite_do_not_pass_as_invariant():
    module = build("llama", blocks=2)
    with torch.no_grad():
        module.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(ModelError, match="changes the logits by nan"):
        require_invariance(open_model(module))


def test_a_saved_configuration_of_a_folded_model_opens_again(small, tmp_path):
    config = folded_config(small("bloom", skeleton=True))
    config.save_pretrained(tmp_path)
    again = SecateurConfig.from_pretrained(tmp_path)
    assert again.to_dict() == config.to_dict()
    assert isinstance(AutoModelForCausalLM.from_config(again), SecateurForCausalLM)


def test_one_position_says_less_in_half_precision():
    dense = torch.ones(2, 3, 5)
    found = dense.clone()
    found[0, 0] = 1.5
    assert _difference(found, dense, exact=True) == pytest.approx(0.5)
    assert _difference(found, dense, exact=False) == 0
    assert _difference(1.5 * dense, dense, exact=False) == pytest.approx(0.5)
    found[1, 2, 0] = math.nan
    assert math.isnan(_difference(found, dense, exact=False))
