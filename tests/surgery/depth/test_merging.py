"""Rules that make one block's weights of several, by hand on small numbers, and on blocks of real architectures."""

import pytest
import torch

from oracles import draw_tokens, forward
from secateur.errors import InputError
from secateur.models.opening import open_model
from secateur.surgery.depth.merging import (
    Shares,
    alike,
    delta_sum,
    mean,
    merge_windows,
    merged_tensors,
    shares_for,
    top,
    weighted,
)
from tiny_models import build

RULES = ("highest", "delta-sum", "top", "mean", "weighted")
INFLUENCE = (0.1, 0.4, 0.2, 0.2, 0.6, 0.0, 0.0, 0.3)


def parameters(decoder, index):
    return {name: p.detach().double() for name, p in decoder.block_list[index].named_parameters()}


def combined(decoder, low, high, rule):
    """The rules, literally, in float64; norms are told by their names."""
    blocks = [parameters(decoder, index) for index in range(low, high + 1)]
    weights = torch.tensor(INFLUENCE[low : high + 1], dtype=torch.float64)
    weights = weights / weights.sum() if weights.sum() > 0 else torch.full_like(weights, 1 / len(weights))
    result = {}
    for name, first in blocks[0].items():
        values = [block[name] for block in blocks]
        if rule == "delta-sum":
            result[name] = first + sum(value - first for value in values[1:])
        elif rule == "top":
            is_norm = "norm" in name or ".ln_" in f".{name}"
            result[name] = first if is_norm else values[-1]
        elif rule == "highest":
            result[name] = values[-1]
        elif rule == "mean":
            result[name] = sum(values) / len(values)
        else:
            result[name] = sum(w * value for w, value in zip(weights, values, strict=True))
    return result


# The arithmetic


@pytest.mark.parametrize(("size", "expected"), [(1, (1,)), (2, (0, 1)), (3, (-1, 1, 1)), (5, (-3, 1, 1, 1, 1))])
def test_delta_sum(size, expected):
    assert delta_sum(size) == Shares(expected, expected)


def test_delta_sum_of_numbers():
    blocks = (3.0, 5.0, -1.0, 2.5)
    by_hand = blocks[0] + sum(value - blocks[0] for value in blocks[1:])
    assert sum(s * v for s, v in zip(delta_sum(4).linears, blocks, strict=True)) == by_hand


def test_top_is_what_the_released_loop_telescopes_to():
    blocks = (3.0, 5.0, -1.0, 2.5)
    updated = blocks[0]
    for value in blocks[1:]:
        updated += value - updated
    assert updated == blocks[-1]
    assert top(4) == Shares((0, 0, 0, 1), (1, 0, 0, 0))


def test_mean_and_weighted():
    assert mean(4).linears == mean(4).norms == (0.25,) * 4
    assert weighted((0.1, 0.3)).linears == pytest.approx((0.25, 0.75))
    assert weighted((0.1, 0.3)).norms == weighted((0.1, 0.3)).linears
    assert weighted((0.0, 0.0)) == mean(2)


@pytest.mark.parametrize("rule", RULES)
def test_shares_of_alike_blocks_change_nothing(rule):
    shares = shares_for(rule, (1, 4), INFLUENCE)
    assert sum(shares.linears) == pytest.approx(1)
    assert sum(shares.norms) == pytest.approx(1)


def test_influences_are_those_of_the_window():
    assert shares_for("weighted", (2, 4), INFLUENCE).linears == pytest.approx((0.2, 0.2, 0.6))
    assert shares_for("weighted", (5, 6), INFLUENCE) == mean(2)


# On blocks


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", ["llama-bias", "qwen3", "gpt2", "mixtral", "olmo", "stablelm-bias"])
def test_merged_blocks(name, rule, tiny):
    decoder = tiny(name)
    merged = merge_windows(decoder, [(5, 6), (1, 3)], rule, INFLUENCE)
    assert merged.block_count == 5
    for place, (low, high) in {1: (1, 3), 3: (5, 6)}.items():
        found, expected = parameters(merged, place), combined(decoder, low, high, rule)
        assert set(found) == set(expected)
        for key in found:
            assert torch.allclose(found[key], expected[key], atol=1e-6), key
    for place, old in {0: 0, 2: 4, 4: 7}.items():
        kept = dict(decoder.block_list[old].named_parameters())
        assert all(p is kept[key] for key, p in merged.block_list[place].named_parameters()), "nothing is copied"


@pytest.mark.parametrize("rule", RULES)
def test_the_given_decoder_stays(rule, tiny):
    decoder = tiny("llama")
    before = {name: tensor.clone() for name, tensor in decoder.module.state_dict().items()}
    merged = merge_windows(decoder, [(2, 4)], rule, INFLUENCE)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.module.state_dict().items())
    assert merged.fingerprint != decoder.fingerprint
    assert merge_windows(decoder, [], rule, INFLUENCE) is decoder


def test_each_edit_is_another_model(tiny):
    decoder = tiny("llama")
    made = [merge_windows(decoder, [(2, 4)], rule, INFLUENCE) for rule in RULES]
    made += [merge_windows(decoder, [(2, 3), (5, 6)], "top"), merge_windows(decoder, [(1, 3)], "top")]
    made.append(merge_windows(decoder, [(2, 4)], "weighted", INFLUENCE[::-1]))
    assert len({one.fingerprint for one in made}) == len(made)


def test_rounded_to_what_is_saved(tiny):
    decoder = tiny("llama", dtype=torch.bfloat16)
    assert decoder.saved_dtype == torch.bfloat16
    for tensor in merged_tensors(decoder, (2, 5), shares_for("mean", (2, 5))).values():
        assert torch.equal(tensor, tensor.bfloat16().to(tensor.dtype))
        assert tensor.dtype == decoder.module.dtype


def test_merging_copies_of_one_block_gives_that_block():
    """Also where attention is scaled by the block's number: the queries are rescaled to the place they move to."""
    module = build("gpt2-scaled", blocks=4)
    blocks = module.transformer.h
    with torch.no_grad():
        for index in (1, 2):
            blocks[index].load_state_dict(blocks[0].state_dict())
            for part in (blocks[index].attn.c_attn.weight, blocks[index].attn.c_attn.bias):
                part[..., :32] *= index + 1
    decoder = open_model(module)
    tokens = draw_tokens()
    for rule in ("highest", "delta-sum", "mean", "top"):
        merged = merge_windows(decoder, [(1, 2)], rule)
        removed = merge_windows(decoder, [(0, 1)], rule)
        assert torch.allclose(forward(merged.module, tokens), forward(removed.module, tokens), atol=1e-4), rule


# What cannot become one


def test_shapes_that_differ(tiny):
    decoder = tiny("qwen3_moe-mixed")
    assert [alike(decoder, index, across_types=False) for index in range(7)] == [0, 0, 1, 1, 0, 0, 1]
    with pytest.raises(InputError, match="blocks 4 and 5 cannot become one: their weights differ in shape"):
        merge_windows(decoder, [(3, 6)], "top", across_types=True)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gemma2", [0, 0, 0, 0, 0, 0, 0]),
        ("gemma3_text", [1, 0, 0, 1, 0, 0, 1]),
        ("smollm3", [0, 0, 1, 0, 0, 1, 0]),
        ("olmo3", [1, 1, 0, 0, 1, 1, 0]),
        ("llama", [1] * 7),
    ],
)
def test_types_that_differ(name, expected, tiny):
    decoder = tiny(name)
    assert [alike(decoder, index, across_types=False) for index in range(7)] == expected
    assert all(alike(decoder, index, across_types=True) for index in range(7))


def test_types_merge_on_request_and_the_lowest_is_kept(tiny):
    decoder = tiny("gemma3_text")
    types = decoder.config.layer_types
    with pytest.raises(InputError, match=r"blocks 1 and 2 .*sliding_attention; full_attention.*across_types=true"):
        merge_windows(decoder, [(1, 2)], "top")
    merged = merge_windows(decoder, [(1, 2), (5, 6)], "top", across_types=True)
    assert merged.config.layer_types == [types[index] for index in (0, 1, 3, 4, 5, 7)]
