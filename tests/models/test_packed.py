"""Blocks that own a part of parameters outside of them, and blocks that use the keys and values of others."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma4Config

from oracles import draw_tokens, forward
from secateur import make_plan, open_model, save
from secateur.calibration.store import StateStore
from secateur.calibration.walk import last_states, stored_start
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError
from secateur.models.detection import detect
from secateur.models.wrappers import auto_class
from secateur.run_options import RunOptions
from secateur.surgery.depth.blocks import keep_blocks
from tiny_models import VARIANTS, drawn_again, save_tiny

NAME = "gemma4_text"
GONE, KEPT = (1, 6), (0, 2, 3, 4, 5, 7)
PACKED = {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0}
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}


def as_published(folder):
    """Add what Google's checkpoints hold of blocks that use the keys and values of others: projections of their own."""
    weights = load_file(folder / "model.safetensors")
    shared = {name: one for name, one in weights.items() if ".4.self_attn.k_" in name}
    found = {name.replace(".4.", f".{block}."): one.clone() for name, one in shared.items() for block in (5, 6)}
    assert found
    save_file(weights | found, folder / "model.safetensors", {"format": "pt"})


def wrapped(folder):
    text = VARIANTS[NAME].config(8).to_dict()
    config = Gemma4Config(text_config=text, vision_config=VISION, audio_config=None)
    drawn_again(auto_class(config).from_config(config, dtype=torch.float32)).save_pretrained(folder)


@pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
@pytest.mark.parametrize("wrapper", [False, True], ids=["text", "wrapper"])
def test_the_parts_of_blocks_go_with_them(wrapper, skeleton, tmp_path):
    if wrapper:
        wrapped(tmp_path / "whole")
    else:
        as_published(save_tiny(NAME, tmp_path / "whole"))
    decoder = open_model(tmp_path / "whole", skeleton=skeleton)
    twice = keep_blocks(keep_blocks(decoder, (0, 2, 3, 4, 5, 6, 7)), (0, 1, 2, 3, 4, 6))
    cut = keep_blocks(decoder, KEPT)
    assert cut.parameter_count == decoder.parameter_count - sum(decoder.block_parameter_counts()[i] for i in GONE)
    tokens = draw_tokens(windows=2)
    dense = auto_class(decoder.module.config).from_pretrained(tmp_path / "whole", dtype=torch.float32).eval()
    blocks = dense.get_submodule(decoder.anatomy.family.blocks)
    for index in GONE:
        blocks[index].register_forward_hook(lambda _module, args, _output: args[0])
    expected = forward(dense, tokens)
    for found in (cut, twice):
        save(found, tmp_path / "cut", check=False)
        again = auto_class(cut.module.config).from_pretrained(tmp_path / "cut", dtype=torch.float32).eval()
        torch.testing.assert_close(forward(again, tokens), expected, rtol=1e-5, atol=1e-5)
    before, after = (load_file(tmp_path / one / "model.safetensors") for one in ("whole", "cut"))
    for name, axis in PACKED.items():
        (whole,) = (one for key, one in before.items() if f"{name}.weight" in key)
        (part,) = (one for key, one in after.items() if f"{name}.weight" in key)
        assert part.shape[axis] * 8 == whole.shape[axis] * 6


@pytest.mark.parametrize(
    ("gone", "said"),
    [
        ((4,), "block 4 must stay: block 6 uses its keys and values"),
        ((7,), "block 6 cannot become the last one, which is always of the kind full_attention"),
    ],
)
def test_what_others_need_must_stay(gone, said, tiny):
    with pytest.raises(ModelError, match=said):
        keep_blocks(tiny(NAME), [index for index in range(8) if index not in gone])


def test_fewer_blocks_than_asked_for_can_go(tiny):
    with pytest.raises(InputError, match="blocks=7: this method can remove at most 6 here; others must stay"):
        make_plan(tiny(NAME), method="last-n", blocks=7)


def test_without_blocks_that_use_them_keys_and_values_are_no_longer_needed(tiny):
    cut = keep_blocks(tiny(NAME), (0, 1, 2, 3))
    assert cut.config.num_kv_shared_layers == 0
    assert AutoModelForCausalLM.from_config(cut.config).num_parameters() == cut.parameter_count


def test_a_model_without_inputs_for_each_block():
    config = VARIANTS[NAME].config(6)
    config.hidden_size_per_layer_input, config.num_kv_shared_layers = 0, 0
    family = detect(config, NAME)
    assert not family.packed
    assert family.kv_shared is None


@torch.no_grad()
def test_batches_do_not_read_keys_and_values_of_each_other(tiny):
    """A skeleton takes all batches through a block before the next block."""
    skeleton = tiny(NAME, skeleton=True)
    tokens = draw_tokens(windows=2)
    found = [state for _, state in last_states(skeleton, Windows.of(tokens), RunOptions(batch_size=1))]
    alone = [state for one in tokens for _, state in last_states(tiny(NAME), Windows.of(one[None]))]
    assert torch.equal(torch.cat(found), torch.cat(alone))
    batches = stored_start(skeleton, Windows.of(tokens[:1].repeat(2, 1)), StateStore(), 1)
    states = [batch.calls[0].kwargs["shared_kv_states"] for batch in batches]
    assert states[0] is not states[1]
