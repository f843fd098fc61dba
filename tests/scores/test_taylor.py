"""The Taylor score against one plain backward pass through the whole model."""

import math

import pytest
import torch

from oracles import draw_windows, no_real_parameters, plain_taylor
from secateur.calibration.store import StateStore
from secateur.calibration.walk import mean_loss
from secateur.errors import NumericsError
from secateur.models.opening import open_model
from secateur.run_options import RunOptions
from secateur.scores.taylor import scored_weights, taylor
from tiny_models import build

NAMES = ["llama", "llama-tied", "gpt2", "gemma3_text", "falcon-rw", "qwen3_moe-mixed", "opt-post-norm"]
MODES = pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])


@pytest.mark.parametrize("per_window", [False, True], ids=["summed", "per window"])
@pytest.mark.parametrize("name", NAMES)
def test_against_a_plain_backward_pass(name, per_window, tiny):
    windows = draw_windows()
    expected = plain_taylor(build(name), windows, per_window=per_window)
    assert taylor(tiny(name), windows, per_window=per_window, options=RunOptions(batch_size=2)) == pytest.approx(
        expected, rel=1e-4
    )
    if not per_window or name == "llama":
        skeleton = tiny(name, skeleton=True)
        assert taylor(skeleton, windows, per_window=per_window) == pytest.approx(expected, rel=1e-4)
        assert no_real_parameters(skeleton.module)


@pytest.mark.parametrize(
    ("name", "side", "per_window"),
    [("llama", "left", False), ("llama", "right", True), ("gpt2", "right", False), ("gemma3_text", "left", True)],
)
def test_with_padding(name, side, per_window, tiny):
    windows = draw_windows(side=side)
    found = taylor(tiny(name), windows, per_window=per_window)
    assert found == pytest.approx(plain_taylor(build(name), windows, per_window=per_window), rel=1e-4)


def test_products_cancel_over_windows_before_the_absolute_value(tiny):
    windows = draw_windows()
    summed, per_window = taylor(tiny("llama"), windows), taylor(tiny("llama"), windows, per_window=True)
    assert all(one < 0.9 * other for one, other in zip(summed, per_window, strict=True))


@pytest.mark.parametrize("batch_size", [1, 3, 4, None])
def test_batches_do_not_change_the_score(batch_size, tiny):
    windows = draw_windows(side="right")
    expected = taylor(tiny("llama"), windows, options=RunOptions(batch_size=2))
    assert taylor(tiny("llama"), windows, options=RunOptions(batch_size=batch_size)) == pytest.approx(
        expected, rel=1e-4
    )


@MODES
def test_with_states_on_disk(skeleton, tiny, monkeypatch):
    windows = draw_windows()
    expected = taylor(tiny("llama"), windows, options=RunOptions(batch_size=2))
    stores = []
    monkeypatch.setattr("secateur.scores.taylor.open_store", lambda _: stores.append(StateStore(0)) or stores[-1])
    assert taylor(tiny("llama", skeleton=skeleton), windows, options=RunOptions(batch_size=2)) == pytest.approx(
        expected, rel=1e-6
    )
    assert len(stores) == 1
    assert not list(stores[0].keys())


def test_the_model_is_left_alone(tiny):
    decoder = tiny("llama")
    before = {name: tensor.clone() for name, tensor in decoder.module.state_dict().items()}
    taylor(decoder, draw_windows())
    for name, parameter in decoder.module.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
        assert not parameter.requires_grad


def test_scored_weights_are_matrices_and_norms_without_biases():
    block = build("gpt2").transformer.h[0]
    names = {name for name, p in block.named_parameters() if any(p is w for w in scored_weights(block).values())}
    assert names == {
        "ln_1.weight",
        "attn.c_attn.weight",
        "attn.c_proj.weight",
        "ln_2.weight",
        "mlp.c_fc.weight",
        "mlp.c_proj.weight",
    }


@MODES
def test_a_gradient_that_overflows_is_never_a_score(skeleton, tmp_path):
    """In half precision, with states so small that norms multiply by millions: forward finite, backward not."""
    module = build("llama")
    module.config.rms_norm_eps = 1e-14
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                parameter.mul_(1e-6)
    module.save_pretrained(tmp_path)
    decoder = open_model(tmp_path, skeleton=skeleton, dtype="float16")
    assert math.isfinite(mean_loss(decoder, draw_windows()))
    with pytest.raises(NumericsError, match="Taylor"):
        taylor(decoder, draw_windows())


@pytest.mark.parametrize("place", ["model.layers.3.mlp.down_proj.weight", "model.layers.3.input_layernorm.weight"])
def test_damage_in_a_block_is_named(place):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = float("nan")
    with pytest.raises(NumericsError, match="block 3"):
        taylor(open_model(module), draw_windows())


@pytest.mark.parametrize("place", ["model.norm.weight", "lm_head.weight"])
def test_damage_after_the_blocks_is_never_a_score(place):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = float("nan")
    with pytest.raises(NumericsError):
        taylor(open_model(module), draw_windows())
