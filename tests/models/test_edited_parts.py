"""Edited weights beside a checkpoint: read in its place, gone with the last model that reads them."""

import gc
import shutil
from collections import namedtuple

import pytest
import torch

from oracles import draw_tokens, no_real_parameters, walk
from secateur.errors import ModelError
from secateur.models.shards import OUTER
from secateur.surgery.depth.blocks import keep_blocks, with_block_tensors


def doubled(decoder, index):
    with decoder.block(index) as block:
        return {name: 2 * p.detach() for name, p in block.named_parameters()}


def edited_files(decoder):
    return [piece.file for pieces in decoder.shards.edited.values() for piece in pieces]


@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe-mixed", "gpt2", "falcon"])
def test_a_skeleton_reads_what_memory_holds(name, tiny):
    memory, skeleton = tiny(name), tiny(name, skeleton=True)
    before = walk(memory, draw_tokens())
    edited = [with_block_tensors(one, [(i, doubled(one, i)) for i in (1, 4)], "doubled") for one in (memory, skeleton)]
    after = [walk(one, draw_tokens()) for one in edited]
    assert torch.equal(after[0], after[1])
    assert not torch.allclose(after[0], before, atol=1e-3)
    assert torch.equal(walk(memory, draw_tokens()), before)
    assert torch.equal(walk(skeleton, draw_tokens()), before)
    assert no_real_parameters(edited[1].module)


def test_edits_follow_their_blocks(tiny):
    memory, skeleton = tiny("llama"), tiny("llama", skeleton=True)
    found = []
    for one in (memory, skeleton):
        once = with_block_tensors(keep_blocks(one, [1, 2, 4, 6]), [(2, doubled(one, 4))], "first")
        twice = with_block_tensors(keep_blocks(once, [0, 2, 3]), [(2, doubled(one, 6))], "second")
        found.append(walk(twice, draw_tokens()))
    assert torch.equal(found[0], found[1])


def test_a_block_edited_twice(tiny):
    skeleton = tiny("llama", skeleton=True)
    once = with_block_tensors(skeleton, [(3, doubled(skeleton, 3))], "once")
    twice = with_block_tensors(once, [(3, doubled(once, 3))], "twice")
    with skeleton.block(3) as block:
        original = block.mlp.up_proj.weight.clone()
    with twice.block(3) as block:
        assert torch.equal(block.mlp.up_proj.weight, 4 * original)


def test_what_is_outside_the_blocks(tiny):
    skeleton = tiny("llama", skeleton=True)
    with skeleton.outer():
        tensors = {
            name: 2 * p.detach()
            for name, p in skeleton.module.named_parameters()
            if not name.startswith("model.layers.")
        }
    shards = skeleton.shards.with_part(OUTER, tensors)
    shards.load(skeleton.module, OUTER, without=("lm_head",))
    assert skeleton.module.lm_head.weight.is_meta
    assert torch.equal(skeleton.module.model.norm.weight, tensors["model.norm.weight"])
    shards.release(skeleton.module, OUTER)


def test_files_live_as_long_as_a_model_reads_them(tiny):
    skeleton = tiny("llama", skeleton=True)
    once = with_block_tensors(skeleton, [(3, doubled(skeleton, 3))], "once")
    (file,) = edited_files(once)
    later = keep_blocks(once, [1, 3, 5])
    del once
    gc.collect()
    assert file.is_file()
    walk(later, draw_tokens())
    del later
    gc.collect()
    assert not file.parent.exists()
    assert edited_files(skeleton) == []


def test_a_missing_tensor_is_noticed(tiny):
    skeleton = tiny("llama", skeleton=True)
    tensors = doubled(skeleton, 3)
    del tensors["mlp.up_proj.weight"]
    broken = with_block_tensors(skeleton, [(3, tensors)], "broken")
    with pytest.raises(ModelError, match=r"no weights for model.layers.3.mlp.up_proj.weight"), broken.block(3):
        pass


def test_no_room(tiny, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1, 1, 0))
    skeleton = tiny("llama", skeleton=True)
    with pytest.raises(OSError, match="no space left for edited weights; set TMPDIR"):
        with_block_tensors(skeleton, [(3, doubled(skeleton, 3))], "once")
