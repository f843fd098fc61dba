"""Walking windows through the blocks: the states are the model's own, the loss is the model's own."""

from dataclasses import replace

import pytest
import torch

from oracles import draw_tokens, draw_windows, no_real_parameters, pad, plain_loss, plain_states
from secateur.calibration.store import StateStore
from secateur.calibration.walk import (
    batch_size_for,
    check_windows,
    loss_sum,
    mean_loss,
    mean_loss_of_sources,
    open_store,
    start,
    states_by_batch,
    walk_blocks,
)
from secateur.data.windows import Windows
from secateur.errors import InputError, NumericsError
from secateur.models.opening import open_model
from secateur.run_options import RunOptions
from tiny_models import build

MODES = pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
SIDES = pytest.mark.parametrize("side", [None, "left", "right"])
NAMES = pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3_text", "falcon-rw", "opt-post-norm", "qwen3_moe-mixed"]
)


def all_states(decoder, windows, batch_size=None, **more):
    """The states of all windows, one tensor (windows, positions, d) per depth."""
    options = RunOptions(batch_size=batch_size)
    parts = [states for _, states in states_by_batch(decoder, windows, options=options, **more)]
    return [torch.cat(of_depth) for of_depth in zip(*parts, strict=True)]


@MODES
@SIDES
@NAMES
def test_states_are_those_of_the_plain_forward(name, side, skeleton, tiny):
    windows = draw_windows(side=side)
    tokens, mask = windows.tokens, windows.mask
    real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
    decoder = tiny(name, skeleton=skeleton)
    found = all_states(decoder, windows, batch_size=4)
    seen = plain_states(tiny(name), tokens, mask)
    assert len(found) == len(seen) == 9
    for state, expected in zip(found, seen, strict=True):
        assert torch.equal(state[real], expected[real])


@MODES
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_the_last_state_is_before_the_final_norm(name, skeleton, tiny):
    windows = draw_windows()
    module = tiny(name).module
    with torch.no_grad():
        hidden = module(input_ids=windows.tokens, use_cache=False, output_hidden_states=True).hidden_states
    found = all_states(tiny(name, skeleton=skeleton), windows, batch_size=4)
    for depth in range(8):
        assert torch.equal(found[depth], hidden[depth])
    assert not torch.allclose(found[8], hidden[8], atol=1e-2)
    final = module.transformer.ln_f if name == "gpt2" else module.model.norm
    with torch.no_grad():
        assert torch.equal(final(found[8]), hidden[8])


@MODES
def test_batches_do_not_change_the_states(skeleton, tiny):
    decoder = tiny("llama", skeleton=skeleton)
    windows = draw_windows(windows=5, side="right")
    real = windows.mask
    whole = all_states(decoder, windows, batch_size=5)
    for size in (1, 2, 3, 100):
        parts = all_states(decoder, windows, batch_size=size)
        for state, expected in zip(parts, whole, strict=True):
            torch.testing.assert_close(state[real], expected[real], rtol=1e-5, atol=1e-5)


@MODES
def test_batches_say_what_they_hold(skeleton, tiny):
    windows = draw_windows(windows=5, side="right")
    batches = [
        batch
        for batch, _ in states_by_batch(tiny("llama", skeleton=skeleton), windows, options=RunOptions(batch_size=2))
    ]
    assert [batch.index for batch in batches] == [0, 1, 2]
    assert torch.equal(torch.cat([batch.tokens for batch in batches]), windows.tokens)
    assert torch.equal(torch.cat([batch.mask for batch in batches]), windows.mask)
    assert all(len(batch.calls) == 8 for batch in batches)


def test_batches_without_padding_share_their_calls(tiny):
    batches = [batch for batch, _ in start(tiny("gemma3_text"), draw_windows(windows=6), 2)]
    assert len(batches) == 3
    assert all(batch.mask is None for batch in batches)
    assert all(batch.calls is batches[0].calls for batch in batches)
    padded = [batch for batch, _ in start(tiny("gemma3_text"), draw_windows(windows=4, side="left"), 2)]
    assert padded[0].calls is not padded[1].calls


@pytest.mark.parametrize("side", [None, "right"])
def test_a_skeleton_spills_to_disk_and_gives_the_same(side, tiny):
    decoder = tiny("qwen3", skeleton=True)
    windows = draw_windows(side=side)
    expected = all_states(decoder, windows, batch_size=2)
    with StateStore(budget=0) as store:
        found = all_states(decoder, windows, batch_size=2, store=store)
        assert not list(store.keys())
    assert all(torch.equal(state, other) for state, other in zip(found, expected, strict=True))
    assert no_real_parameters(decoder.module)


def test_the_store_of_a_skeleton_is_smaller_than_its_blocks(tiny):
    skeleton = tiny("qwen3_moe-mixed", skeleton=True)
    with open_store(skeleton) as store:
        assert 0 < store.budget < 4 * max(skeleton.block_parameter_counts())
    with open_store(tiny("qwen3_moe-mixed")) as store:
        assert store.budget > 1 << 20


@pytest.mark.parametrize("only_last", [False, True])
@pytest.mark.parametrize("budget", [None, 0])
def test_walking_block_by_block(only_last, budget, tiny):
    windows = draw_windows()
    expected = plain_states(tiny("llama"), windows.tokens)
    for skeleton in (False, True):
        with StateStore(budget) as store:
            batches = walk_blocks(
                tiny("llama", skeleton=skeleton), windows, store, only_last=only_last, options=RunOptions(batch_size=2)
            )
            depths = [8] if only_last else range(9)
            assert set(store.keys()) == {(batch, depth) for batch in (0, 1) for depth in depths}
            for depth in depths:
                state = torch.cat([store.get((batch.index, depth)) for batch in batches])
                torch.testing.assert_close(state, expected[depth], rtol=1e-5, atol=1e-5)


def test_states_carry_no_gradients(tiny):
    for _, states in states_by_batch(tiny("llama"), draw_windows()):
        assert not any(state.requires_grad for state in states)


# Padding


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text", "bloom", "qwen3_moe"])
def test_padding_on_the_right_changes_no_real_token(name, tiny):
    decoder = tiny(name)
    tokens, mask = pad(draw_tokens(), "right")
    padded = all_states(decoder, Windows.of(tokens, mask), batch_size=4)
    for row in range(len(tokens)):
        length = int(mask[row].sum())
        alone = all_states(decoder, Windows.of(tokens[row : row + 1, :length]))
        for state, expected in zip(padded, alone, strict=True):
            torch.testing.assert_close(state[row, :length], expected[0], rtol=1e-4, atol=1e-4)


# Loss


@MODES
@SIDES
@NAMES
def test_mean_loss_is_the_cross_entropy_of_the_plain_logits(name, side, skeleton, tiny):
    windows = draw_windows(side=side)
    found = mean_loss(tiny(name, skeleton=skeleton), windows, options=RunOptions(batch_size=3))
    assert found == pytest.approx(plain_loss(tiny(name).module, windows), rel=1e-5)


def test_mean_loss_agrees_with_the_model_own_loss(tiny):
    windows = draw_windows()
    with torch.no_grad():
        own = tiny("llama").module(input_ids=windows.tokens, labels=windows.tokens, use_cache=False).loss
    assert mean_loss(tiny("llama"), windows) == pytest.approx(float(own), rel=1e-5)


def test_mean_loss_weighs_tokens_not_windows(tiny):
    decoder = tiny("llama")
    tokens, mask = pad(draw_tokens(), "right")
    lengths = mask.sum(dim=1)
    each = [mean_loss(decoder, Windows.of(tokens[i : i + 1, : lengths[i]])) for i in range(len(tokens))]
    by_tokens = sum(loss * float(n - 1) for loss, n in zip(each, lengths, strict=True)) / float((lengths - 1).sum())
    assert mean_loss(decoder, Windows.of(tokens, mask)) == pytest.approx(by_tokens, rel=1e-5)
    assert abs(sum(each) / len(each) - by_tokens) > 1e-4


def test_loss_is_the_same_in_parts(tiny, monkeypatch):
    """Logits of few windows at a time, where all of them would not fit."""
    windows = draw_windows(windows=5, side="right")
    expected = mean_loss(tiny("llama"), windows, options=RunOptions(batch_size=5))
    rows = []
    monkeypatch.setattr("secateur.calibration.walk._LOGIT_BYTES", 2 * 4 * 16 * 256)
    from secateur.calibration import walk as stream

    plain = stream.logits
    monkeypatch.setattr(stream, "logits", lambda d, h, *rest: (rows.append(len(h)), plain(d, h, *rest))[1])
    assert mean_loss(tiny("llama"), windows, options=RunOptions(batch_size=5)) == pytest.approx(expected, rel=1e-6)
    assert rows == [2, 2, 1]


def test_predictions_are_counted(tiny):
    decoder = tiny("llama")
    for side, expected in ((None, 4 * 15), ("right", 15 + 12 + 9 + 6), ("left", 15 + 12 + 9 + 6)):
        counted = 0
        for batch, states in states_by_batch(decoder, draw_windows(side=side)):
            total, predictions = loss_sum(decoder, batch, states[-1])
            assert total.dtype == torch.float64
            counted += predictions
        assert counted == expected


def test_windows_without_a_prediction_are_refused(tiny):
    with pytest.raises(InputError):
        mean_loss(tiny("llama"), Windows.of([[5], [6]]))
    lonely = torch.tensor([[True, False, False], [False, True, False]])
    with pytest.raises(InputError):
        mean_loss(tiny("llama"), Windows.of([[5, 0, 0], [0, 6, 0]], lonely))


# What cannot be walked


def test_windows_longer_than_the_positions(tiny):
    check_windows(tiny("llama"), draw_windows(positions=64))
    with pytest.raises(InputError, match="windows of 65 tokens, but the model has 64 positions"):
        check_windows(tiny("llama"), draw_windows(positions=65))
    check_windows(tiny("bloom"), draw_windows(positions=65))
    with pytest.raises(InputError, match="64 positions"):
        mean_loss(tiny("gpt2"), draw_windows(positions=65))


def test_tokens_outside_the_vocabulary(tiny):
    check_windows(tiny("llama"), Windows.of([[0, 255]]))
    with pytest.raises(InputError, match="256"):
        check_windows(tiny("llama"), Windows.of([[0, 256]]))


@pytest.mark.parametrize("size", [0, -1])
def test_batch_size_below_one(size, tiny):
    with pytest.raises(InputError, match="batch size"):
        batch_size_for(tiny("llama"), draw_windows(), size)


def test_batch_size(tiny):
    assert batch_size_for(tiny("llama"), draw_windows(), 3) == 3
    assert batch_size_for(tiny("llama"), draw_windows(positions=16)) == 64
    assert batch_size_for(tiny("llama"), draw_windows(positions=64)) == 16


# Damage


def damaged(place, value=float("nan")):
    module = build("llama")
    with torch.no_grad():
        module.get_parameter(place).view(-1)[5] = value
    return open_model(module)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damage_in_a_block_is_named(value):
    decoder = damaged("model.layers.3.mlp.down_proj.weight", value)
    with pytest.raises(NumericsError, match="block 3"):
        mean_loss(decoder, draw_windows())
    with pytest.raises(NumericsError, match="block 3"):
        list(states_by_batch(decoder, draw_windows()))
    with StateStore() as store, pytest.raises(NumericsError, match="block 3"):
        walk_blocks(decoder, draw_windows(), store)


@pytest.mark.parametrize("place", ["model.norm.weight", "lm_head.weight"])
def test_damage_after_the_blocks_never_becomes_a_loss(place):
    with pytest.raises(NumericsError):
        mean_loss(damaged(place), draw_windows())


def test_damage_in_the_embeddings_is_not_blamed_on_a_block():
    module = build("llama")
    with torch.no_grad():
        module.model.embed_tokens.weight[7] = float("nan")
    with pytest.raises(NumericsError, match="embeddings"):
        mean_loss(open_model(module), Windows.of([[5, 6, 7, 8]]))


@MODES
@pytest.mark.parametrize("side", [None, "left"])
def test_each_source_of_a_mixture_counts_the_same(side, skeleton, tiny):
    windows = replace(draw_windows(windows=5, side=side), part_of=torch.tensor([0, 1, 0, 0, 0]), parts=("a", "b"))
    decoder = tiny("llama", skeleton=skeleton)
    apart = [mean_loss(decoder, windows.some(rows)) for rows in ([0, 2, 3, 4], [1])]
    found = mean_loss_of_sources(decoder, windows, options=RunOptions(batch_size=2))
    assert found == pytest.approx(sum(apart) / 2, rel=1e-6)
    assert mean_loss_of_sources(decoder, replace(windows, part_of=None)) == mean_loss(decoder, windows)
