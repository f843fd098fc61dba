"""What a trial finds in a block of an unknown family: widths, heads, residual streams, shared weights."""

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from oracles import draw_tokens, forward, reloaded, walk
from secateur import make_plan, prune, save
from secateur.data.windows import Windows
from secateur.errors import ModelError
from secateur.models import detection
from secateur.models.anatomy import residual_factor
from secateur.models.depth import reason_to_keep
from secateur.models.opening import open_model
from secateur.models.shrinking import divisors, shrunken
from secateur.models.widths import block_widths
from secateur.surgery.depth.blocks import keep_blocks
from tiny_models import HIDDEN, SIZES, drawn_again, of_type

ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}


def test_several_residual_streams(tmp_path):
    """The blocks of DeepSeek-V4 pass on four streams, on an axis of their own."""
    config = AutoConfig.for_model("deepseek_v4", num_hidden_layers=6)
    tiny = shrunken(config, next(divisors(config)))
    module = drawn_again(AutoModelForCausalLM.from_config(tiny, dtype=torch.float32))
    decoder, tokens = open_model(module), draw_tokens() // 2
    assert decoder.state_size == 4 * decoder.hidden_size
    assert torch.equal(walk(decoder, tokens), forward(module, tokens))
    cut = reloaded(keep_blocks(decoder, (0, 1, 2, 3, 5)).module, tmp_path)
    torch.testing.assert_close(forward(cut, tokens), walk(decoder, tokens, without=(4,)), rtol=1e-4, atol=1e-4)
    with pytest.raises(ModelError, match="each of its 4 residual streams"):
        make_plan(decoder, method="replaceme", blocks=1, texts=Windows.of(tokens))


# Widths that are not an entry of the configuration as it stands

COMPUTED = {
    "lfm2": (
        {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 8, "intermediate_size": 72},
        ("intermediate_size", 1, (("block_auto_adjust_ff_dim", False),)),
    ),
    "moshi": ({"ffn_dim": 96, "head_dim": 8}, ("ffn_dim", 2, ())),
    "recurrent_gemma": ({"intermediate_size": 96, "lru_width": 32, "head_dim": 8}, ("intermediate_size", 2, ())),
}


@pytest.mark.parametrize("model_type", COMPUTED)
def test_computed_widths_are_found_and_set(model_type, tmp_path):
    settings, traits = COMPUTED[model_type]
    decoder = open_model(of_type(model_type, **{"num_hidden_layers": 4, **settings}))
    family = decoder.anatomy.family
    assert (family.inner_size, family.inner_scale, family.resized) == traits
    assert block_widths(decoder, 0).channels == 48
    windows = Windows.of(draw_tokens())
    plan = make_plan(decoder, method="obs-width", texts=windows, settings={"ffn": 32, "heads": "never"})
    pruned = prune(decoder, plan, texts=windows)
    assert block_widths(pruned, 0).channels == 32
    assert getattr(pruned.config, family.inner_size) == 32 * family.inner_scale
    again = reloaded(pruned.module, tmp_path)
    assert torch.equal(forward(again, draw_tokens()), forward(pruned.module, draw_tokens()))


@pytest.mark.parametrize(
    ("model_type", "settings", "entry", "factor"),
    [
        ("granite_swa", {"residual_multiplier": 0.22}, "residual_multiplier", 0.22),
        ("granite_swa", {}, None, 1.0),
        ("minicpm3", {"scale_depth": 1.4}, "scale_depth", 1.4 / 8**0.5),
    ],
)
def test_the_factor_of_what_enters_the_stream_is_found(model_type, settings, entry, factor):
    latent = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8}
    config = AutoConfig.for_model(model_type, **SIZES, **(latent if model_type == "minicpm3" else {}), **settings)
    family = detection.detect(config, "somewhere")
    assert family.residual_multiplier == entry
    assert residual_factor(config, family) == pytest.approx(factor)


@pytest.mark.parametrize(
    ("model_type", "settings", "known"),
    [
        ("qwen2_moe", {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 24}, True),
        ("olmoe", {"num_experts": 4, "num_experts_per_tok": 2}, False),  # a norm runs over all heads together
        ("gpt_oss", {**ROUTED, "num_local_experts": 4, "head_dim": 8}, True),  # a sink beside each head
        ("flint", {}, True),
    ],
)
def test_heads_are_found_where_a_trial_proves_them(model_type, settings, known, tmp_path):
    config = AutoConfig.for_model(model_type, **{**SIZES, "num_hidden_layers": 2, **settings})
    family = detection.detect(config, "somewhere")
    assert bool(family.attention_in) == bool(family.attention_out) == known
    if not known:
        return
    decoder, windows = (
        open_model(of_type(model_type, **{**settings, "num_hidden_layers": 2})),
        Windows.of(draw_tokens()),
    )
    plan = make_plan(decoder, method="obs-width", texts=windows, settings={"groups": 1})
    pruned = prune(decoder, plan, texts=windows)
    assert (pruned.config.num_attention_heads, pruned.config.num_key_value_heads) == (2, 1)
    assert torch.equal(forward(reloaded(pruned.module, tmp_path), draw_tokens()), forward(pruned.module, draw_tokens()))


SSM = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 2, "ssm_state_size": 4, "chunk_size": 8}


def test_blocks_without_channels_stay_when_channels_go(tmp_path):
    """A block of Nemotron-H is a state space, attention or an MLP; what the row does not name is not gone."""
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"] * 2
    module = of_type("nemotron_h", **SSM, layers_block_type=kinds, head_dim=8)
    decoder, windows = open_model(module), Windows.of(draw_tokens())
    assert reason_to_keep(decoder.config, decoder.anatomy.family, (1, 3, 5, 7)) is None
    assert "linear_attention must stay" in reason_to_keep(decoder.config, decoder.anatomy.family, (0, 4))
    plan = make_plan(decoder, method="obs-width", texts=windows, settings={"ffn": 32, "heads": "never"})
    pruned = prune(decoder, plan, texts=windows)
    assert [block_widths(pruned, block).channels for block in range(8)] == [0, 32] * 4
    assert plan.sizes_after().total == pruned.parameter_count
    assert torch.equal(forward(reloaded(pruned.module, tmp_path), draw_tokens()), forward(pruned.module, draw_tokens()))


def test_blocks_that_share_weights(tmp_path):
    """The attention and MLPs of Zamba are one module, used by several blocks: they stay as they are."""
    kinds = ["linear_attention", "hybrid"] * 3
    settings = {"n_mamba_heads": 2, "mamba_d_state": 4, "mamba_dt_rank": 2, "attention_head_dim": 16}
    module = of_type("zamba", num_hidden_layers=6, **settings, layers_block_type=kinds)
    decoder, tokens = open_model(module), draw_tokens()
    counts = decoder.block_parameter_counts()
    assert counts[1] - counts[0] == HIDDEN * HIDDEN  # the projection of the hybrid block alone
    cut = keep_blocks(decoder, (0, 1, 3, 4, 5))
    assert cut.parameter_count == decoder.parameter_count - counts[2]
    save(cut, tmp_path / "cut", check=False)
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
    torch.testing.assert_close(forward(again, tokens), walk(decoder, tokens, without=(2,)), rtol=1e-5, atol=1e-5)
    with pytest.raises(ModelError, match="no MLP was found"):
        make_plan(decoder, method="obs-width", texts=Windows.of(tokens), settings={"ffn": 32})
