"""While a block of a skeleton runs, the system is asked to read the next one."""

import os

import pytest
import torch
from safetensors import safe_open

from oracles import draw_tokens, walk
from secateur.calibration.store import StateStore
from secateur.models.opening import open_model
from secateur.surgery.depth.blocks import keep_blocks
from tiny_models import build

pytestmark = pytest.mark.skipif(not hasattr(os, "posix_fadvise"), reason="the system takes no advice about files")


@pytest.fixture
def advised(monkeypatch):
    """Bytes that were asked for, in pieces no larger than what a system reads at a time; neighbours joined."""
    found, ends = [], {}

    def advise(descriptor, begin, size, advice):
        assert advice == os.POSIX_FADV_WILLNEED
        assert 0 < size <= 128 << 10
        piece = os.pread(descriptor, size, begin)
        if found and ends.get(descriptor) == begin:
            found[-1] += piece
        else:
            found.append(piece)
        ends[descriptor] = begin + size

    monkeypatch.setattr(os, "posix_fadvise", advise)
    return found


def stored(file, names):
    """The bytes of some tensors, in any order."""
    with safe_open(file, framework="pt") as opened:
        return sorted(bytes(opened.get_tensor(name).view(torch.uint8).numpy()) for name in names)


def test_it_asks_for_the_bytes_of_the_tensors(tiny, advised):
    model = tiny("llama", skeleton=True)
    (file, names), *_ = files_of_block(model, 1)
    model.shards.read_ahead(1)
    assert sum(map(len, advised)) == sum(map(len, stored(file, names)))
    assert all(any(one in found for found in advised) for one in stored(file, names))


def test_each_block_is_asked_for_while_the_one_before_runs(tiny, advised):
    model = keep_blocks(tiny("llama", skeleton=True), [0, 2, 3])
    with model.block(0):
        (file, names), *_ = files_of_block(model, 2)  # the second that is left
        assert all(any(one in found for found in advised) for one in stored(file, names))
        advised.clear()
    with model.block(2):
        assert not advised, "there is no block after the last"


def test_another_checkpoint_in_the_place_of_one_that_was_read(tmp_path, advised):
    for blocks in (2, 4):
        build("llama", blocks=blocks).save_pretrained(tmp_path)
        model = open_model(tmp_path, skeleton=True)
        advised.clear()
        with model.block(blocks - 2):
            (file, names), *_ = files_of_block(model, blocks - 1)
            assert all(any(one in found for found in advised) for one in stored(file, names))


def test_a_system_that_takes_no_advice_reads_all_the_same(tiny, monkeypatch):
    monkeypatch.delattr(os, "posix_fadvise")
    assert torch.equal(walk(tiny("llama", skeleton=True), draw_tokens()), walk(tiny("llama"), draw_tokens()))


def test_states_that_spilled_are_asked_for_in_the_order_of_writing(advised):
    states = [torch.full((40_000,), float(number)) for number in range(3)]
    with StateStore(budget=0) as store:
        for number, state in enumerate(states):
            store.put(number, state)
        assert torch.equal(store.get(0), states[0])
        assert b"".join(advised) == bytes(states[1].view(torch.uint8).numpy())
        advised.clear()
        assert torch.equal(store.get(2), states[2])
        assert not advised, "nothing was written after the last"


def files_of_block(model, number):
    """The files that hold a block of the checkpoint, each with the names of its tensors."""
    files = {}
    for name, file in model.shards.keys[number].items():
        files.setdefault(file, []).append(name)
    return list(files.items())
