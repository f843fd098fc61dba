"""Slicing by principal directions against an oracle that shares no code with it."""

import math

import pytest
import torch

from oracles import draw_windows, forward, no_real_parameters, plain_loss, walk
from oracles_slicing import slicegpt_loss
from secateur.calibration.walk import mean_loss
from secateur.data.texts import open_texts
from secateur.data.windows import Windows
from secateur.errors import NumericsError
from secateur.models.opening import open_model
from secateur.run_options import RunOptions
from secateur.surgery.hidden.own_bases import slice_by_principal_directions
from tiny_models import UNSLICEABLE, VARIANTS, build

SLICEABLE = [name for name in VARIANTS if name not in UNSLICEABLE]
BLOCKS = 4
UNEVEN = [24, 16, 32, 8]


@pytest.fixture(scope="module")
def text(bundled):
    return open_texts("python-stdlib", bundled.tokenizer, windows=4, seq_len=128)


@pytest.fixture(scope="module")
def small(tiny):
    """Return a tiny model of a few blocks; not to be changed."""
    return lambda name, **settings: tiny(name, blocks=BLOCKS, **settings)


def parameters(decoder):
    """All parameters by name, those of a skeleton read block by block."""
    found = {}
    with decoder.outer():
        found |= {n: p.detach().clone() for n, p in decoder.module.named_parameters() if not p.is_meta}
    for index in range(decoder.block_count):
        with decoder.block(index) as block:
            path = decoder.anatomy.block_path(index)
            found |= {f"{path}.{n}": p.detach().clone() for n, p in block.named_parameters()}
    return found


@pytest.mark.parametrize("width", [168, 152, 128], ids=["10%", "20%", "30%"])
def test_the_bundled_model_loses_what_the_oracle_loses(width, bundled, text):
    sliced, loss = slice_by_principal_directions(bundled, text, [width] * 12, 192)
    expected = slicegpt_loss(bundled.module, text.tokens, [width] * 12)
    assert math.exp(loss - expected) == pytest.approx(1, abs=2e-3)
    assert math.exp(mean_loss(sliced, text) - expected) == pytest.approx(1, abs=5e-3)


@pytest.mark.parametrize(("side", "signals"), [(None, "raw"), ("left", "normed"), ("right", "raw")])
@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "gpt_neox-sequential"])
def test_tiny_models_lose_what_the_oracle_loses(name, side, signals, small):
    decoder, windows = small(name), draw_windows(positions=24, side=side)
    sliced, loss = slice_by_principal_directions(decoder, windows, UNEVEN, 32, signals=signals)
    expected = slicegpt_loss(decoder.module, windows.tokens, UNEVEN, windows.mask, signals)
    assert plain_loss(decoder.module, windows) == pytest.approx(
        slicegpt_loss(decoder.module, windows.tokens, [32] * BLOCKS, windows.mask), rel=1e-5
    )
    assert loss == pytest.approx(expected, rel=1e-4)
    assert mean_loss(sliced, windows) == pytest.approx(loss, rel=1e-6)
    assert plain_loss(sliced.module, windows) == pytest.approx(loss, rel=1e-5)
    assert abs(loss - plain_loss(decoder.module, windows)) > 1e-3, "the cut shows"


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox"])
def test_a_sliced_head_loses_what_the_oracle_loses(name, small):
    decoder, windows = small(name), draw_windows(positions=24, side="left")
    sliced, loss = slice_by_principal_directions(decoder, windows, UNEVEN, 16)
    expected = slicegpt_loss(decoder.module, windows.tokens, UNEVEN, windows.mask, head=16)
    assert loss == pytest.approx(expected, rel=1e-4)
    assert plain_loss(sliced.module, windows) == pytest.approx(loss, rel=1e-5)
    assert abs(loss - slice_by_principal_directions(decoder, windows, UNEVEN, 32)[1]) > 3e-4, "the cut shows"


def test_raw_and_normed_signals_keep_different_directions(small):
    decoder, windows = small("llama"), draw_windows()
    _, raw = slice_by_principal_directions(decoder, windows, UNEVEN, 32, signals="raw")
    _, normed = slice_by_principal_directions(decoder, windows, UNEVEN, 32, signals="normed")
    assert abs(raw - normed) > 1e-3


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
def test_every_block_has_the_width_it_was_given(name, small):
    decoder = small(name)
    sliced, _ = slice_by_principal_directions(decoder, draw_windows(), UNEVEN, 32)
    each = 1 if decoder.anatomy.parallel else 2
    assert sliced.config.widths == [width for width in UNEVEN for _ in range(each)] + [32]
    assert all(sliced.config.shortcuts)
    for width, following, block in zip(UNEVEN, [*UNEVEN[1:], 32], sliced.block_list, strict=True):
        assert block.self_attn.q_proj.weight.shape[1] == block.mlp.up_proj.weight.shape[1] == width
        assert block.self_attn.o_proj.weight.shape[0] == (width if each == 2 else following)
        assert block.mlp.down_proj.weight.shape[0] == following
        assert tuple(block.mlp_shortcut.weight.shape) == (following, width)
    assert sliced.module.lm_head.weight.shape[1] == 32
    assert sliced.module.get_input_embeddings().weight.shape[1] == UNEVEN[0]


def test_batches_do_not_change_what_is_kept(small):
    decoder, windows = small("llama"), draw_windows(side="left")
    losses = [
        slice_by_principal_directions(decoder, windows, UNEVEN, 32, options=RunOptions(batch_size=size))[1]
        for size in (1, 3, 4)
    ]
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-5)


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "mixtral", "bloom"])
def test_a_skeleton_gives_the_same_model(name, small):
    windows = draw_windows(side="left")
    sliced, loss = slice_by_principal_directions(small(name), windows, UNEVEN, 32)
    light, lightly = slice_by_principal_directions(small(name, skeleton=True), windows, UNEVEN, 32)
    assert light.is_skeleton
    assert no_real_parameters(small(name, skeleton=True).module)
    expected, found = parameters(sliced), parameters(light)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert lightly == pytest.approx(loss, rel=1e-12)
    assert light.fingerprint == sliced.fingerprint
    assert torch.equal(walk(light, windows.tokens), forward(sliced.module, windows.tokens))


@pytest.mark.parametrize("name", ["llama", "opt", "bloom"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_what_stands_at_padding_is_ignored(name, side, small):
    windows = draw_windows(side=side)
    other = Windows.of(windows.tokens.masked_fill(~windows.mask, 77), windows.mask)
    sliced, loss = slice_by_principal_directions(small(name), windows, UNEVEN, 32)
    again, same = slice_by_principal_directions(small(name), other, UNEVEN, 32)
    assert same == pytest.approx(loss, rel=1e-6)
    shown = draw_windows(seed=5).tokens
    torch.testing.assert_close(forward(again.module, shown), forward(sliced.module, shown), rtol=1e-3, atol=1e-3)


def test_the_given_model_stays_as_it_is():
    decoder = open_model(build("llama-tied", blocks=BLOCKS))
    before, config = parameters(decoder), decoder.config.to_dict()
    slice_by_principal_directions(decoder, draw_windows(), UNEVEN, 32)
    assert all(torch.equal(before[name], now) for name, now in parameters(decoder).items())
    assert decoder.config.to_dict() == config
    assert decoder.module.lm_head.weight is decoder.module.model.embed_tokens.weight


def test_two_runs_give_the_same_model(small):
    windows = draw_windows()
    first, second = (slice_by_principal_directions(small("llama"), windows, UNEVEN, 32)[0] for _ in range(2))
    assert all(map(torch.equal, parameters(first).values(), parameters(second).values()))
    assert first.fingerprint == second.fingerprint != small("llama").fingerprint
    third, _ = slice_by_principal_directions(small("llama"), draw_windows(seed=9), UNEVEN, 32)
    assert third.fingerprint != first.fingerprint


@pytest.mark.parametrize("name", SLICEABLE)
def test_full_width_leaves_the_logits_alone(name, small):
    decoder, windows = small(name), draw_windows(side="left")
    whole, _ = slice_by_principal_directions(decoder, windows, [32] * BLOCKS, 32)
    expected = forward(decoder.module, windows.tokens, windows.mask)[windows.mask]
    found = forward(whole.module, windows.tokens, windows.mask)[windows.mask]
    assert float((found - expected).abs().max() / expected.abs().max()) < 2e-5


@pytest.mark.parametrize("where", ["embed_tokens", "layers.0.self_attn.v_proj", "layers.2.mlp.up_proj", "norm"])
def test_damaged_weights_are_refused(where):
    module = build("llama", blocks=BLOCKS)
    with torch.no_grad():
        module.model.get_submodule(where).weight.view(-1)[0] = math.nan
    with pytest.raises(NumericsError, match="NaN"):
        slice_by_principal_directions(open_model(module), Windows.of(torch.arange(256).view(16, 16)), UNEVEN, 32)
