"""A block run once leaves with another output projection what a second run with it leaves."""

import pytest
import torch

from oracles import draw_windows
from secateur.calibration.store import StateStore
from secateur.calibration.walk import step, stored_start
from secateur.errors import NumericsError
from secateur.models.anatomy import find
from secateur.surgery.width.exchange import Exchange
from secateur.surgery.width.inputs import holding, writer_of

INDEX = 2


def other_writer(decoder):
    """The output projection of the MLP with other numbers in it."""
    name = writer_of(decoder, INDEX, "channels")
    writer = find(decoder.block_list[INDEX], name)
    noise = torch.randn(writer.weight.shape, generator=torch.Generator().manual_seed(1))
    return {f"{name}.weight": writer.weight + noise.to(writer.weight)}


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("room", [1 << 30, 0])
@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "opt"])
def test_states_are_the_same_to_the_last_bit(name, room, side, tiny):
    decoder = tiny(name)
    edits = other_writer(decoder)
    with StateStore(room) as store:
        batches = stored_start(decoder, draw_windows(4, 16, side=side), store, 2)
        entering = [store.get(batch.index).clone() for batch in batches]
        exchange = Exchange(decoder, INDEX, store)
        for batch, hidden in zip(batches, entering, strict=True):
            assert torch.equal(exchange.run(batch), step(decoder, INDEX, batch, hidden))
        exchange.advance(edits, batches)
        with holding(decoder.block_list[INDEX], edits):
            for batch, hidden in zip(batches, entering, strict=True):
                assert torch.equal(store.get(batch.index), step(decoder, INDEX, batch, hidden))
        assert set(store.keys()) == {batch.index for batch in batches}


def test_the_block_does_not_run_again(tiny):
    decoder = tiny("llama")
    with StateStore() as store:
        batches = stored_start(decoder, draw_windows(4, 16), store, 2)
        exchange, runs = Exchange(decoder, INDEX, store), []
        hook = decoder.block_list[INDEX].register_forward_hook(lambda *_: runs.append(1))
        for batch in batches:
            exchange.run(batch)
        exchange.advance(other_writer(decoder), batches)
        hook.remove()
    assert len(runs) == len(batches)


@pytest.mark.parametrize(
    ("name", "possible"),
    [("llama", True), ("gpt2", True), ("gemma2", False), ("gpt_neox", False), ("qwen3_moe", False)],
)
def test_where_it_is_possible(name, possible, tiny):
    assert Exchange.possible(tiny(name), INDEX) is possible


def test_numbers_that_are_none_are_named(tiny):
    decoder = tiny("llama")
    ((name, weight),) = other_writer(decoder).items()
    with StateStore() as store:
        batches = stored_start(decoder, draw_windows(2, 16), store, 2)
        exchange = Exchange(decoder, INDEX, store)
        exchange.run(batches[0])
        with pytest.raises(NumericsError, match=f"the output of block {INDEX}"):
            exchange.advance({name: weight * torch.inf}, batches)
