"""Narrower blocks compute what the dense ones do with zeros where the units were."""

import copy

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.pytorch_utils import Conv1D

from oracles import draw_tokens, draw_windows, forward
from secateur import open_model
from secateur.errors import ModelError
from secateur.models.anatomy import find, present
from secateur.models.families import FAMILIES
from secateur.models.loading import empty_model
from secateur.models.widths import block_widths
from secateur.plan.steps import Widths
from secateur.surgery.width.pruning import Refit, prune_width
from secateur.surgery.width.target import dense_widths, reason_against_heads, stock_config, width_sizes
from tiny_models import FAMILIES as SUPPORTED
from tiny_models import VARIANTS


def last_units(place, weight, sums, units, keep):
    """Keep the last units of each group; those of expert 1 the first."""
    stay = torch.zeros(units.shape[:2], dtype=torch.bool)
    if place.expert == 1:
        stay[:, :keep] = True
    else:
        stay[:, units.shape[1] - keep :] = True
    return stay


def with_zeros(decoder, widths):
    """The dense module, its projections that write with zeros in the columns of all but the last units."""
    module, family = copy.deepcopy(decoder.module), decoder.anatomy.family
    for index, block in enumerate(find(module, family.blocks)):
        dense, keep = block_widths(decoder, index), widths[index]
        heads = torch.zeros(dense.groups, dense.queries, dense.head_size)
        heads[dense.groups - keep.groups :, dense.queries - keep.queries :] = 1
        channels = torch.zeros(max(1, dense.experts), dense.channels)
        channels[:, dense.channels - keep.channels :] = 1
        if dense.experts:
            channels[1] = channels[1].flip(0)
        for names, mask in ((family.attention_out, heads.flatten()), (family.mlp_out, channels)):
            writer = next(present(block, names))[1]
            weight = getattr(writer, "weight", writer)
            if weight.dim() == 3:
                weight.data *= mask[:, None, :]
            else:
                weight.data *= mask.view(-1, 1) if isinstance(writer, Conv1D) else mask.view(1, -1)
    return module


def narrowed_and_expected(decoder, widths, *, stock):
    found = prune_width(decoder, draw_windows(2, 8), widths, last_units, stock=stock, refit=Refit(repair=False)).decoder
    assert found.parameter_count == width_sizes(decoder, stock=stock).sizes_at(widths).total
    tokens = draw_tokens(2, 12, seed=3)
    torch.testing.assert_close(
        forward(found.module, tokens), forward(with_zeros(decoder, widths), tokens), rtol=1e-3, atol=2e-4
    )
    return found


@pytest.mark.parametrize(
    "name", ["llama-bias", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "cohere", "qwen3_moe"]
)
def test_stock_models_with_fewer_groups_and_channels(name, tiny):
    decoder = tiny(name)
    dense = dense_widths(decoder)[0]
    widths = (Widths(groups=dense.groups // 2, queries=dense.queries, channels=dense.channels // 3),) * 8
    found = narrowed_and_expected(decoder, widths, stock=True)
    assert type(found.module) is type(decoder.module)
    assert found.config.num_key_value_heads == 1
    assert found.config.head_dim == block_widths(decoder, 0).head_size


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "falcon", "olmo2", "stablelm-parallel", "opt-post-norm"])
def test_stock_models_with_fewer_channels(name, tiny):
    decoder = tiny(name)
    widths = tuple(one.model_copy(update={"channels": 20}) for one in dense_widths(decoder))
    assert type(narrowed_and_expected(decoder, widths, stock=True).module) is type(decoder.module)


@pytest.mark.parametrize(
    "name", ["llama-tied", "smollm3", "gpt2", "gpt_neox", "falcon-new", "stablelm", "bloom", "mixtral"]
)
def test_uneven_models(name, tiny):
    """Every second block loses heads (queries where groups are few), the others channels."""
    decoder = tiny(name)
    dense, free = dense_widths(decoder), not reason_against_heads(decoder)
    fewer = {"queries": 1} if dense[0].queries > 1 else {"groups": 1}
    widths = tuple(
        one.model_copy(update=fewer if block % 2 and free else {"channels": 8 + block})
        for block, one in enumerate(dense)
    )
    assert stock_config(decoder, widths) is None
    found = narrowed_and_expected(decoder, widths, stock=False)
    assert found.config.intermediate_sizes == [one.channels for one in widths]
    assert found.config.heads == [one.groups * one.queries for one in widths]
    assert found.config.tie_word_embeddings == (name in ("llama-tied", "smollm3"))


def test_nothing_removed_is_the_same_model(tiny):
    for name in ("llama", "gpt2"):
        decoder = tiny(name)
        same = prune_width(decoder, draw_windows(1, 4), dense_widths(decoder), last_units, stock=True).decoder
        assert torch.equal(forward(same.module, draw_tokens()), forward(decoder.module, draw_tokens()))


@pytest.mark.parametrize(
    "name",
    [one for one in SUPPORTED if one not in ("falcon", "secateur", "nemotron-nas") and FAMILIES[one].attention_out],
)
def test_families_whose_heads_may_be_narrower_than_the_stream(name):
    """`free_heads` is what the family's code makes of a configuration with two heads of 8 in a stream of 32."""
    config, family = VARIANTS[name].config(4), FAMILIES[name]
    config.head_dim, config.num_attention_heads, config.num_key_value_heads = 8, 2, 1
    module = empty_model(config, torch.float32, torch.device("cpu"), trust_remote_code=False)
    blocks = find(module, family.blocks)
    writer = next(one for block in blocks for _, one in present(block, family.attention_out))
    inputs = writer.weight.shape[0 if isinstance(writer, Conv1D) else 1]
    assert family.free_heads == (inputs == 16)


def test_head_counts_that_the_configuration_refuses():
    """LlamaConfig wants a hidden size that its heads divide."""
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    decoder = open_model(LlamaForCausalLM(config))
    dense = dense_widths(decoder)[0]
    possible = [stock_config(decoder, [dense.model_copy(update={"groups": count})] * 2) for count in (3, 2, 1)]
    assert [one and (one.num_attention_heads, one.head_dim) for one in possible] == [None, (2, 8), (1, 8)]


def test_no_stock_model_for_uneven_widths(tiny):
    decoder = tiny("llama")
    widths = list(dense_widths(decoder))
    widths[3] = widths[3].model_copy(update={"channels": 24})
    with pytest.raises(ModelError, match="no llama can have these widths"):
        prune_width(decoder, draw_windows(), widths, last_units, stock=True)
