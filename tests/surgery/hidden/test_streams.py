"""What reads and writes the residual stream of architectures that the modelling file cannot hold, and their slicing."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM

from oracles import draw_windows, forward, no_real_parameters, walk
from secateur import make_plan, prune, save
from secateur.errors import ModelError
from secateur.models.anatomy import find
from secateur.models.opening import open_model
from secateur.surgery.hidden.shared_basis import SharedBases, find_bases, slice_with_shared_bases
from secateur.surgery.hidden.stock import stock_stream_sizes, width_step
from secateur.surgery.hidden.stream_trial import with_stream
from tiny_models import of_type

BLOCKS, DENSE, KEPT = 4, 32, 24
OF_OTHER_FORM = ("deepseek_v3", "qwen3_next", "gpt_oss", "nemotron_h", "falcon_h1", "llama4_text", "ministral3")
"""Latent and linear attention, sinks, single branches, state spaces beside attention, routers that scale inputs."""


@pytest.fixture(scope="module")
def small(tiny):
    """Return a tiny model of a few blocks; not to be changed."""
    return lambda name, **settings: tiny(name, blocks=BLOCKS, **settings)


def basis(seed=0):
    drawn = torch.randn(DENSE, DENSE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return SharedBases((0,), (torch.linalg.qr(drawn).Q[:, :KEPT],))


def projected(decoder, bases):
    """Return a copy in whose stream only the kept directions survive: of what each branch adds, and of embeddings."""
    module, directions = copy.deepcopy(decoder.module), bases.directions[0]
    matrix = (directions @ directions.T).float()

    def keep(_module, _args, output):
        return (output[0] @ matrix, *output[1:]) if isinstance(output, tuple) else output @ matrix

    module.get_input_embeddings().register_forward_hook(keep)
    for block in find(module, decoder.anatomy.family.blocks):
        for branch in block.children():
            if "Norm" not in type(branch).__name__:
                branch.register_forward_hook(keep)
    return module


@pytest.mark.parametrize("name", OF_OTHER_FORM)
def test_what_is_not_kept_is_gone_and_nothing_else(name, small, tmp_path):
    decoder, windows = with_stream(small(name)), draw_windows()
    sliced = slice_with_shared_bases(decoder, windows, basis(), stock=True, reconstruct=False)
    expected = forward(projected(decoder, basis()), windows.tokens)
    found = forward(sliced.module, windows.tokens)
    assert float((found - expected).abs().max() / expected.abs().max()) < 1e-5
    assert float((found - forward(decoder.module, windows.tokens)).abs().max() / expected.abs().max()) > 1e-2

    sizes = stock_stream_sizes(decoder)
    points = sizes.points_per_block * BLOCKS
    counted = sizes.sizes_at([KEPT] * (points + 1), [False] * points)
    assert counted.blocks == sliced.block_parameter_counts()
    assert counted.total == sliced.parameter_count < decoder.parameter_count
    assert sizes.sizes_at([DENSE] * (points + 1), [False] * points).total == decoder.parameter_count

    assert type(sliced.module) is type(decoder.module)
    sliced.module.save_pretrained(tmp_path)
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True, dtype=torch.float32)
    assert not any(report.values())
    assert again.config.hidden_size == KEPT
    assert torch.equal(forward(again.eval(), windows.tokens), found)


@pytest.mark.parametrize("name", ["qwen3_next", "nemotron_h"])
def test_a_skeleton_gives_the_same_model(name, small):
    windows = draw_windows()
    whole, skeleton = with_stream(small(name)), with_stream(small(name, skeleton=True))
    bases, same = (find_bases(decoder, windows, KEPT) for decoder in (whole, skeleton))
    assert all(map(torch.equal, bases.directions, same.directions))
    sliced, light = (slice_with_shared_bases(one, windows, bases, stock=True) for one in (whole, skeleton))
    assert no_real_parameters(light.module)
    assert torch.equal(walk(light, windows.tokens), forward(sliced.module, windows.tokens))
    assert light.fingerprint == sliced.fingerprint


def test_a_cut_of_another_form_is_saved_as_one_of_its_family(small, tmp_path):
    decoder, windows = small("deepseek_v3"), draw_windows()
    plan = make_plan(decoder, method="stock-slicing", slicing=0.25, texts=windows)
    pruned = prune(decoder, plan, texts=windows)
    assert pruned.parameter_count == plan.parameters_after
    save(pruned, tmp_path / "sliced", check=False)
    again = open_model(tmp_path / "sliced")
    assert torch.equal(forward(again.module, windows.tokens), forward(pruned.module, windows.tokens))
    assert again.hidden_size == KEPT
    with pytest.raises(ModelError, match=r"one basis may do \(stock-slicing\)"):
        make_plan(decoder, method="slicegpt", slicing=0.25, texts=windows)


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        ("minimax", "what its norm `input_layernorm` gives is not only read by projections"),
        ("jamba", r"an inner size follows from the hidden size \(that of `mamba.A_log`\)"),
        ("lfm2", r"an inner size follows from the hidden size \(that of `conv.in_proj.weight`\)"),
        ("bamba", r"an inner size follows from the hidden size \(that of `mamba.conv1d.weight`\)"),
        ("gemma2", "a norm stands between its branches and the residual stream"),
        ("cohere2", "only its sliding attention has rotary positions"),
        ("gemma4_text", "`model.per_layer_model_projection.weight` stands between its embeddings and its blocks"),
        ("persimmon", "its norms subtract a mean"),
        ("doge", "`input_residual` is no projection and no norm"),
    ],
)
def test_a_refusal_says_what_is_not_understood(model, reason, small, request):
    try:
        decoder = small(model)
    except KeyError:
        decoder = open_model(of_type(model, num_hidden_layers=BLOCKS))
    with pytest.raises(ModelError, match=f"the hidden size of this model cannot be sliced: .*{reason}"):
        with_stream(decoder)


def test_sizes_of_state_spaces_that_a_model_has_not_follow_its_hidden_size(tmp_path):
    attention = {"num_hidden_layers": 2, "layer_types": ["attention"] * 2, "num_local_experts": 0}
    decoder = with_stream(open_model(of_type("granitemoehybrid", **attention, mamba_n_heads=16)))
    windows = draw_windows()
    assert width_step(decoder, 4) == 8, "of which 16 heads make up twice the hidden size"
    sliced = slice_with_shared_bases(decoder, windows, basis(), stock=True, reconstruct=False)
    sliced.module.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    assert again.config.mamba_d_head * 16 == again.config.mamba_expand * KEPT
    found = forward(again, windows.tokens)
    assert torch.equal(found, forward(sliced.module, windows.tokens))
    assert float((found - forward(projected(decoder, basis()), windows.tokens)).abs().max() / found.abs().max()) < 1e-5


def test_heads_that_a_configuration_ties_to_the_hidden_size_need_the_modelling_file(small):
    assert width_step(small("helium"), 8) is None
    assert width_step(small("llama"), 8) == 8
