"""Unknown families: found without a row where a trial proves the guess, refused where it does not."""

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BertConfig,
    BertLMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from oracles import draw_tokens, forward, no_real_parameters, reloaded, walk
from secateur.errors import ModelError
from secateur.models import detection
from secateur.models.families import FAMILIES
from secateur.models.forward import final_states, inputs_of
from secateur.models.opening import open_model
from secateur.models.shrinking import shrunken
from secateur.surgery.depth.blocks import keep_blocks
from tiny_models import OTHER_FAMILIES, SIZES, VARIANTS, VOCABULARY, build, drawn_again, of_type

KEPT = (0, 1, 3, 4, 6, 7)
ROUTED = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
# Architectures with what makes them hard: dense and sparse blocks mixed by lists and counts, kinds of attention.
FURTHER = {
    "qwen2_moe": {**ROUTED, "num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [1, 5]},
    "solar_open": {**ROUTED, "head_dim": 8, "n_routed_experts": 4, "first_k_dense_replace": 3},
    "gpt_neo": {"num_layers": 8, "num_heads": 4, "attention_types": [[["global", "local"], 4]], "window_size": 8},
    "openai-gpt": {"n_positions": 64},  # its blocks return lists, and share one activation
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 8},
}


def test_none_of_these_has_a_row():
    assert OTHER_FAMILIES
    assert not set(FAMILIES) & ({VARIANTS[name].model_type for name in OTHER_FAMILIES} | set(FURTHER))


@pytest.mark.parametrize("name", OTHER_FAMILIES)
def test_other_families_open_by_detection(name, tiny):
    decoder, skeleton = tiny(name), tiny(name, skeleton=True)
    tokens = draw_tokens()
    expected = forward(build(name), tokens)
    for one in (decoder, skeleton):
        family = one.anatomy.family
        assert family.detected
        assert family.model_type == VARIANTS[name].model_type
        assert family.blocks == "model.layers"
        assert family.embeddings == ("model.embed_tokens",)
        assert family.head == "lm_head"
        assert "(detected)" in one.anatomy.describe()["family"]
        assert one.block_count == 8
        assert torch.equal(walk(one, tokens), expected)
    assert no_real_parameters(skeleton.module)


@pytest.mark.parametrize("model_type", FURTHER)
def test_further_architectures(model_type, tmp_path):
    module = of_type(model_type, **FURTHER[model_type])
    decoder = open_model(module)
    assert decoder.anatomy.family.detected
    tokens = draw_tokens()
    assert torch.equal(walk(decoder, tokens), forward(module, tokens))
    cut = reloaded(keep_blocks(decoder, KEPT).module, tmp_path)
    torch.testing.assert_close(forward(cut, tokens), walk(decoder, tokens, without=(2, 5)), rtol=1e-5, atol=1e-5)


def test_a_list_of_block_numbers_as_long_as_the_model(tmp_path):
    """`moe_layers` of a Llama 4 whose blocks are all sparse is [0, 1, … L−1]: numbers, not one entry per block."""
    module = of_type("llama4_text", num_local_experts=4, head_dim=8, intermediate_size_mlp=48)
    assert module.config.moe_layers == list(range(8))
    try:
        decoder = open_model(module)
    except ModelError:
        return  # refusing is honest too
    tokens = draw_tokens()
    cut = reloaded(keep_blocks(decoder, KEPT).module, tmp_path)
    torch.testing.assert_close(forward(cut, tokens), walk(decoder, tokens, without=(2, 5)), rtol=1e-5, atol=1e-5)


def test_final_states_of_a_model_that_is_its_own_base_model():
    """`base_model` of Llama 4's text model is the model with its head."""
    module = of_type("llama4_text", num_local_experts=4, head_dim=8, intermediate_size_mlp=48)
    decoder, tokens = open_model(module), draw_tokens()
    with torch.no_grad():
        hidden = module.model(input_ids=tokens, output_hidden_states=True, use_cache=False)
        assert module.base_model is module
        with inputs_of([module.model.norm]) as before_norm:
            module(input_ids=tokens, use_cache=False)
        found = final_states(decoder, before_norm[0], tokens)
    assert torch.equal(found, hidden.last_hidden_state)


def test_token_ids_are_not_taken_for_block_numbers():
    module = of_type("granite", eos_token_id=[1, 2])
    for ids in ([1, 2], [7, 3, 3, 1, 1, 1, 1, 0]):
        module.config.eos_token_id = ids
        found = detection._guess(module, module.config)
        assert "eos_token_id" not in (*found.block_numbers, *found.per_layer_lists)


def test_routing_is_not_taken_for_looking_ahead():
    """Experts are computed together, so another last token changes how sums are rounded, but nothing more."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_local_experts": 4, "num_experts_per_tok": 2}
    config = AutoConfig.for_model("granitemoe_swa", **{**SIZES, **sizes})
    module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    assert open_model(module).anatomy.family.detected


def test_detection_leaves_the_random_state_alone():
    module = build("helium", blocks=2)
    before = torch.get_rng_state()
    open_model(module)
    assert torch.equal(torch.get_rng_state(), before)


def test_detection_leaves_the_configuration_alone():
    module = build("olmo3")
    before = module.config.to_json_string()
    open_model(module)
    assert module.config.to_json_string() == before


def test_the_trial_is_small_however_large_the_model(monkeypatch):
    config = AutoConfig.for_model("gptj", n_embd=512, n_head=4, n_layer=8, rotary_dim=64, vocab_size=VOCABULARY)
    tried = []
    prove = detection._prove

    def counting(decoder, **given):
        tried.append(decoder.parameter_count)
        return prove(decoder, **given)

    monkeypatch.setattr(detection, "_prove", counting)
    detection.detect(config, "a large gptj")
    assert max(tried) < 2_000_000


# What is refused: a Llama of our own in which one thing is odd


class OddConfig(LlamaConfig):
    model_type = "odd-llama"
    oddity: str = "none"


class OddModel(LlamaModel):
    config: OddConfig

    def __init__(self, config):
        super().__init__(config)
        for index, layer in enumerate(self.layers):
            layer.self_attn.is_causal = config.oddity != "looks ahead"
            if config.oddity == "depends on depth":
                layer.self_attn.scaling /= index + 1

    def forward(self, input_ids=None, **_):
        hidden = self.embed_tokens(input_ids)
        positions = torch.arange(input_ids.shape[1])[None]
        turns = self.rotary_emb(hidden, positions)
        for index, layer in enumerate(self.layers):
            if self.config.oddity == "leaves a block out" and index == 1:
                continue
            hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns)
            if self.config.oddity == "works between blocks":
                hidden = hidden * 1.5
            if self.config.oddity == "calls blocks twice":
                hidden = layer(hidden, attention_mask=None, position_ids=positions, position_embeddings=turns)
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden))


class OddForCausalLM(LlamaForCausalLM):
    config_class = OddConfig
    config: OddConfig

    def __init__(self, config):
        super().__init__(config)
        self.model = OddModel(config)
        if config.oddity == "has one block too many":
            self.model.layers.append(type(self.model.layers[0])(config, config.num_hidden_layers))
        if config.oddity == "has no head":
            self.get_output_embeddings = lambda: None
        self.post_init()


@pytest.fixture
def odd(monkeypatch):
    monkeypatch.setitem(CONFIG_MAPPING._extra_content, "odd-llama", OddConfig)
    monkeypatch.setitem(MODEL_FOR_CAUSAL_LM_MAPPING._extra_content, OddConfig, OddForCausalLM)
    return lambda oddity: drawn_again(OddForCausalLM(OddConfig(**SIZES, oddity=oddity)))


def test_the_odd_llama_opens_where_nothing_is_odd(odd, tmp_path):
    odd("none").save_pretrained(tmp_path)
    decoder = open_model(tmp_path)
    assert isinstance(decoder.module, OddForCausalLM)
    assert decoder.anatomy.family.detected
    tokens = draw_tokens()
    assert torch.equal(walk(decoder, tokens), forward(odd("none"), tokens))


@pytest.mark.parametrize(
    ("oddity", "said"),
    [
        ("looks ahead", "not causal"),
        ("works between blocks", "running its blocks one by one does not give"),
        ("leaves a block out", "'odd-llama'|did not call all"),
        ("calls blocks twice", "odd-llama"),
        ("has one block too many", "counts 8 blocks, and no list in the model holds as many .the longest holds 9"),
        ("has no head", "odd-llama"),
    ],
)
def test_what_the_trial_disproves_is_refused(odd, oddity, said):
    with pytest.raises(ModelError, match=said):
        open_model(odd(oddity))


def test_where_no_block_can_go_widths_can_still_be_pruned(odd):
    decoder = open_model(odd("depends on depth"))
    assert decoder.anatomy.family.fixed_blocks == tuple(range(8))
    assert decoder.anatomy.family.mlp_out == ("mlp.down_proj",)
    with pytest.raises(ModelError, match="block 2 must stay: a model without it computes something else"):
        keep_blocks(decoder, KEPT)


def test_a_skeleton_is_refused_alike(odd, tmp_path):
    odd("looks ahead").save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not causal"):
        open_model(tmp_path, skeleton=True)


def test_an_encoder_with_a_language_head_is_refused(tmp_path):
    small = {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}
    module = BertLMHeadModel(BertConfig(**small))
    with pytest.raises(ModelError, match="not causal"):
        open_model(module)
    module.save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="not causal"):
        open_model(tmp_path)


@pytest.mark.parametrize(
    ("model_type", "settings"),
    [
        ("reformer", {"is_decoder": False}),
        ("blt", {}),
    ],
)
def test_a_family_that_cannot_be_proved_is_refused(model_type, settings):
    """With one message of ours, whatever transformers says underneath."""
    config = AutoConfig.for_model(model_type, **settings)
    with pytest.raises(ModelError, match=model_type):
        detection.detect(config, "somewhere")


@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("blt", "does not say how many blocks it has"),
        ("rwkv", "cannot be run one by one: they pass on 3 values, not the residual stream alone"),
        ("longcat_flash", "counts 56 blocks, and no list in the model holds as many"),
    ],
)
def test_a_refusal_says_what_cannot_be_done(model_type, said):
    with pytest.raises(ModelError, match=said):
        detection.detect(AutoConfig.for_model(model_type), "somewhere")


def test_what_was_proved_once_is_not_tried_again(monkeypatch):
    config = AutoConfig.for_model("gptj", n_embd=128, n_head=4, n_layer=4, rotary_dim=16, vocab_size=VOCABULARY)
    first = detection.detect(config, "a gptj")
    monkeypatch.setattr(detection, "_detected", None)
    assert detection.detect(config, "the same") is first


def test_the_parts_of_a_configuration_shrink_with_it():
    """DBRX keeps the sizes of attention and experts in configurations of their own."""
    tiny = shrunken(AutoConfig.for_model("dbrx"), 16)
    assert (tiny.d_model, tiny.ffn_config.ffn_hidden_size) == (128, 224)
