"""What a pruned block reads and what its attention writes, brought back to the dense model's."""

import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from oracles import draw_windows
from secateur import make_plan, prune
from secateur.calibration.folds import folds_of
from secateur.calibration.store import StateStore
from secateur.calibration.walk import step, stored_start
from secateur.models.anatomy import find
from secateur.surgery.width.alignment import Alignment, of_middle
from secateur.surgery.width.inputs import holding, of_dense
from tiny_models import FAMILIES

RIDGE = 0.1
ATTENTION, MLP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")


def pruned(decoder, windows, **settings):
    settings = {"ffn": 24, "ridge": RIDGE, "candidates": 1.0, "align": True} | settings
    return prune(decoder, make_plan(decoder, method="obs-width", texts=windows, settings=settings), texts=windows)


def seen_by(decoder, windows, index):
    """What enters and leaves the parts of a block, by name, (tokens, n), float64."""
    block, found = decoder.block_list[index], {}

    def keep(name):
        def hook(_, args, output):
            found[name] = tuple(one.detach().flatten(0, 1).double() for one in (args[0], output))

        return hook

    names = ("input_layernorm", "self_attn.o_proj", "post_attention_layernorm")
    hooks = [find(block, name).register_forward_hook(keep(name)) for name in names]
    decoder.module(input_ids=windows.tokens, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def fitted(read, lacking, weight):
    """Straight line: the map from what is read to what is lacking, by the normal equations."""
    gram = read.T @ (weight[:, None] * read)
    ridge = RIDGE * gram.diagonal().mean() * torch.eye(len(gram), dtype=torch.float64)
    return torch.linalg.solve(gram + ridge, read.T @ (weight[:, None] * lacking)).T


@pytest.mark.parametrize("index", [1, 4])
def test_against_straight_lines(index, tiny):
    dense, windows = tiny("llama"), draw_windows(8, 16)
    found = pruned(dense, windows)
    own, there = seen_by(found, windows, index), seen_by(dense, windows, index)
    even = torch.full((windows.token_count,), 1 / windows.token_count, dtype=torch.float64)
    same = torch.eye(dense.hidden_size, dtype=torch.float64)
    before, after = dense.block_list[index], found.block_list[index]

    def weight(block, name):
        return find(block, name).weight.double()

    def turn(norm):
        return same + fitted(own[norm][1], there[norm][1] - own[norm][1], even)

    for name in ATTENTION:
        expected = weight(before, name) @ turn("input_layernorm")
        torch.testing.assert_close(weight(after, name), expected, atol=1e-5, rtol=1e-4)

    entering, written = own["input_layernorm"][0], own["self_attn.o_proj"][0]
    middle = entering + written @ weight(before, "self_attn.o_proj").T
    lacking, light = there["post_attention_layernorm"][0] - middle, even / middle.square().mean(dim=1)
    expected = weight(before, "self_attn.o_proj") + fitted(written, lacking, light)
    torch.testing.assert_close(weight(after, "self_attn.o_proj"), expected, atol=1e-5, rtol=1e-4)

    for name in MLP:
        expected = weight(before, name) @ turn("post_attention_layernorm")
        nearest = torch.cdist(weight(after, name), expected).min(dim=1).values
        assert float(nearest.max()) < 1e-4, "each row that stays is one of those expected"


def test_it_is_never_worse_on_held_out_windows(tiny):
    told = pruned(tiny("llama"), draw_windows(16, 16), ridge="auto").history[-1]["repair"]
    assert {one["part"] for one in told} == {"heads", "channels", "attention inputs", "MLP inputs"}
    assert all(one["error"] <= one["error_without_repair"] for one in told)


def test_the_first_block_that_is_cut_reads_what_it_read(tiny):
    dense = tiny("llama")
    found = pruned(dense, draw_windows(8, 16))
    for name in (*ATTENTION, "self_attn.o_proj"):
        assert torch.equal(find(found.block_list[0], name).weight, find(dense.block_list[0], name).weight)
        assert not torch.equal(find(found.block_list[1], name).weight, find(dense.block_list[1], name).weight)


def test_not_on_request(tiny):
    dense = tiny("llama")
    found = pruned(dense, draw_windows(8, 16), align=False)
    for block, before in zip(found.block_list, dense.block_list, strict=True):
        assert all(torch.equal(find(block, name).weight, find(before, name).weight) for name in ATTENTION)


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "qwen3_moe", "phi3"])
def test_readers_are_found_and_the_state_after_attention(name, side, tiny):
    """Where both models are the same, nothing changes."""
    decoder, windows = tiny(name), draw_windows(4, 16, side=side)
    family = decoder.anatomy.family
    assert Alignment.possible(decoder, 2)
    with StateStore() as store:
        (batch,) = stored_start(decoder, windows, store, 4)
        store.put(of_dense(batch), store.get(batch.index))
        aligned = Alignment(decoder, 2, [batch], store, folds_of(windows), "auto")
        assert aligned.writes_middle(batch)
        aligned.fit_attention_inputs()
        with aligned.watching(batch):
            whole = step(decoder, 2, batch, store.get(of_dense(batch)))
        assert torch.equal(store.get(of_middle(batch)), aligned.after_attention(batch))
        of_attention, of_mlp = dict(aligned.attention_inputs()), dict(aligned.mlp_inputs({}))
        assert set(of_attention) == {f"{one}.weight" for one in family.attention_in}
        block = decoder.block_list[2]
        dense_in = {f"{one}.weight" for one in family.mlp_in if type(find(block, one)) in (nn.Linear, Conv1D)}
        assert dense_in <= set(of_mlp)
        with holding(block, of_attention | of_mlp):
            assert torch.equal(step(decoder, 2, batch, store.get(batch.index)), whole)
        aligned.forget()
        assert set(store.keys()) == {batch.index, of_dense(batch)}


@pytest.mark.parametrize("name", ["gemma2", "gpt_neox", "falcon"])
def test_not_where_branches_are_not_one_after_the_other_on_the_stream(name, tiny):
    assert not Alignment.possible(tiny(name), 2)


def test_every_family_can_be_asked(tiny):
    assert {Alignment.possible(tiny(name), 1) for name in FAMILIES} == {True, False}
