"""Bases that many reading points share: what is measured, what is read, and what stays a stock model."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError

from oracles import draw_windows, forward, no_real_parameters, plain_loss, predictions, token_losses, walk
from secateur.calibration.reading_points import points_per_block, visit_gradients, visit_reading_points
from secateur.calibration.ridge import GRID
from secateur.data.texts import open_texts
from secateur.errors import ModelError, NumericsError
from secateur.models.anatomy import find, present
from secateur.models.opening import open_model
from secateur.run_options import RunOptions
from secateur.surgery import hidden
from secateur.surgery.hidden.directions import (
    Covariance,
    Reconstruction,
    by_rows,
    principal_directions,
    sensitive_directions,
    unit_scale,
)
from secateur.surgery.hidden.shared_basis import (
    SharedBases,
    basis_of,
    find_bases,
    find_borders,
    slice_with_shared_bases,
)
from secateur.surgery.hidden.stock import StockSlicing, config_of_width, stock_stream_sizes, width_step
from tiny_models import VARIANTS, build

STOCK = (
    "llama",
    "llama-tied",
    "llama-bias",
    "qwen2-sliding",
    "qwen3",
    "smollm3",
    "gemma",
    "phi3",
    "granite",
    "mixtral",
    "qwen3_moe-mixed",
)
BLOCKS = 4


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthonormal(size, width, seed=0):
    return torch.linalg.qr(drawn(size, size, seed=seed)).Q[:, :width]


def projector(directions):
    return directions @ directions.T


@pytest.fixture(scope="module")
def small(tiny):
    """Return a tiny model of a few blocks; not to be changed."""
    return lambda name, **settings: tiny(name, blocks=BLOCKS, **settings)


def gap(found, expected):
    """Largest difference relative to the largest number."""
    return float((found - expected).abs().max() / expected.abs().max())


# Directions and readings


def test_principal_directions_are_those_of_largest_variance():
    states = drawn(200, 6) * torch.tensor([1.0, 5.0, 0.1, 3.0, 0.5, 2.0])
    covariance = Covariance(6)
    covariance.update(states[:50])
    covariance.update(states[50:])
    torch.testing.assert_close(covariance.matrix(), states.T @ states)
    _, _, rows = np.linalg.svd(states.numpy())
    found = principal_directions(covariance.matrix())
    np.testing.assert_allclose(np.abs((found.T @ torch.from_numpy(rows.T)).numpy()), np.eye(6), atol=1e-10)
    assert (found.gather(0, found.abs().argmax(0, keepdim=True)) > 0).all()


def test_a_normed_covariance_weighs_every_token_alike():
    states = drawn(20, 6) * 10 ** drawn(20, 1)
    covariance = Covariance(6, "normed")
    covariance.update(states)
    expected = sum(np.outer(row, row) / np.mean(row**2) for row in states.numpy())
    np.testing.assert_allclose(covariance.matrix().numpy(), expected)
    assert float(covariance.matrix().trace()) == pytest.approx(20 * 6)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_covariance_that_is_not_finite_is_refused(value):
    covariance = Covariance(6)
    covariance.update(drawn(20, 6).index_fill(0, torch.tensor([3]), value))
    with pytest.raises(NumericsError, match="NaN or infinity"):
        covariance.matrix()


def test_sensitive_directions_follow_the_formula():
    states, slopes = drawn(300, 12, seed=1) * torch.linspace(0.2, 3, 12), drawn(300, 12, seed=2)
    slopes = slopes * torch.linspace(2, 0.1, 12)
    covariance, gradients = states.T @ states, slopes.T @ slopes
    before = gradients.clone()
    found = sensitive_directions(covariance, gradients, 5)
    assert torch.equal(gradients, before)

    gamma = gradients.numpy()
    values, vectors = np.linalg.eigh(gamma * 12 / np.trace(gamma) + 0.3 * np.eye(12))
    root = vectors @ np.diag(np.sqrt(values)) @ vectors.T
    _, inner = np.linalg.eigh(root @ covariance.numpy() @ root)
    basis, _ = np.linalg.qr(np.linalg.inv(root) @ inner[:, ::-1][:, :5])
    np.testing.assert_allclose(projector(found).numpy(), basis @ basis.T, atol=1e-9)
    torch.testing.assert_close(found.T @ found, torch.eye(5, dtype=torch.float64))


def test_without_preference_sensitive_directions_are_principal_ones():
    states = drawn(300, 12) * torch.linspace(0.2, 3, 12)
    covariance = states.T @ states
    found = sensitive_directions(covariance, 7.0 * torch.eye(12, dtype=torch.float64), 5)
    torch.testing.assert_close(projector(found), projector(principal_directions(covariance)[:, :5]))


def test_a_direction_that_the_loss_feels_is_kept_though_it_varies_little():
    covariance = torch.diag(torch.tensor([9.0, 4.0, 1.0], dtype=torch.float64))
    gradients = torch.diag(torch.tensor([0.0, 0.0, 5.0], dtype=torch.float64))
    found = sensitive_directions(covariance, gradients, 1)
    torch.testing.assert_close(found.abs()[:, 0], torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))


@pytest.mark.parametrize("tokens", [8, 400, 40_000])
def test_a_reading_is_the_least_squares_solution_beside_as_many_tokens_as_directions_that_say_a_plain_slice(tokens):
    eps, states, directions = 1e-2, drawn(tokens, 12, seed=3) @ drawn(12, 12, seed=4), orthonormal(12, 5)
    fit = Reconstruction(directions, eps)
    fit.update(states[: tokens // 4].float())
    fit.update(states[tokens // 4 :].float())
    exact = states.float().double().numpy()
    kept = exact @ directions.numpy()
    kept = kept / np.sqrt((kept**2).sum(1, keepdims=True) / 12 + eps)
    wanted = exact / np.sqrt((exact**2).mean(1, keepdims=True) + eps)
    prior = np.sqrt((kept**2).mean() * 5) * np.eye(5)
    solution, *_ = np.linalg.lstsq(np.vstack([kept, prior]), np.vstack([wanted, prior @ directions.numpy().T]))
    np.testing.assert_allclose(fit.reading().numpy(), solution.T, atol=1e-4)
    assert gap(fit.reading(), directions) > 0.01
    if tokens > 10_000:
        plain, *_ = np.linalg.lstsq(kept, wanted)
        np.testing.assert_allclose(solution, plain, atol=2e-3)


def test_a_reading_of_everything_is_the_rotation_itself():
    fit = Reconstruction(orthonormal(12, 12), 1e-6)
    fit.update(drawn(400, 12))
    torch.testing.assert_close(fit.reading(), orthonormal(12, 12), rtol=0, atol=1e-5)


def test_the_ridge_of_a_reading_is_the_best_one_on_held_out_tokens():
    directions, weight, held_out = orthonormal(12, 5), drawn(90, 1, seed=1).abs()[:, 0] + 0.1, torch.arange(90) % 3 == 0
    for states in (drawn(90, 12, seed=3) @ drawn(12, 12, seed=4), drawn(90, 12, seed=3)):
        fit = Reconstruction(directions, 1e-6)
        fit.update(states, weight, held_out)
        kept, wanted = unit_scale(states @ directions) * np.sqrt(12 / 5), unit_scale(states)

        def solved(rows, ridge, kept=kept, wanted=wanted):
            heavy = kept[rows] * weight[rows, None]
            steady = heavy.T @ kept[rows] + ridge * torch.eye(5, dtype=torch.float64)
            return torch.linalg.solve(steady, heavy.T @ wanted[rows] + ridge * directions.T)

        scale = (kept[~held_out].square() * weight[~held_out, None]).sum() / 5
        errors = {None: directions.T} | {float(ridge * scale): solved(~held_out, ridge * scale) for ridge in GRID}
        for ridge, matrix in errors.items():
            missed = (kept @ matrix - wanted)[held_out].square().sum(dim=1)
            errors[ridge] = float((missed * weight[held_out]).sum())
        nearly = [r for r in errors if r and errors[None] - errors[r] >= 0.95 * (errors[None] - min(errors.values()))]
        best = None if min(errors, key=errors.get) is None else max(nearly)
        expected = directions if best is None else solved(torch.ones(90, dtype=torch.bool), best).T
        torch.testing.assert_close(fit.reading(), expected, rtol=1e-5, atol=1e-6)


# What is measured


def norms(decoder, module):
    """Norms in the order of the reading points."""
    family, each = decoder.anatomy.family, points_per_block(decoder)
    blocks = [[norm for _, norm in present(block, family.norms)][:each] for block in find(module, family.blocks)]
    return [*(norm for block in blocks for norm in block), find(module, family.final[0])]


def entering(decoder, module):
    """Start to record what enters each norm."""
    seen = {}
    for point, norm in enumerate(norms(decoder, module)):
        norm.register_forward_pre_hook(lambda _, args, point=point: seen.__setitem__(point, args[0]))
    return seen


def collected(visit_all, decoder, windows):
    """What a visitor is shown, by point, and the order of the points."""
    shown = {}
    options = RunOptions(batch_size=3)
    visit_all(decoder, windows, lambda point, states, _: shown.setdefault(point, []).append(states), options=options)
    return {point: torch.cat(states) for point, states in shown.items()}


def as_shown(decoder, states, mask):
    states = states.reshape(*mask.shape, -1)[mask]
    return states - states.mean(-1, keepdim=True) if decoder.anatomy.family.norm == "layernorm" else states


MEASURED = (
    "llama",
    "gemma",
    "opt",
    "gpt_neox",
    "cohere",
    "falcon-new",
    "bloom",
    "mixtral",
)


@pytest.mark.parametrize("name", MEASURED)
def test_states_at_the_points_are_what_the_norms_read(name, small):
    decoder, windows = small(name), draw_windows(side="left")
    module = copy.deepcopy(decoder.module)
    expected = entering(decoder, module)
    forward(module, windows.tokens, windows.mask)
    found = collected(visit_reading_points, decoder, windows)
    assert sorted(found) == sorted(expected) == list(range(points_per_block(decoder) * BLOCKS + 1))
    for point in expected:
        wanted = as_shown(decoder, expected[point], windows.mask)
        torch.testing.assert_close(found[point], wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", MEASURED)
def test_gradients_at_the_points_are_those_of_the_whole_model(name, small, monkeypatch):
    decoder, windows = small(name), draw_windows(side="left")
    two_windows = 2 * 4 * windows.seq_len * decoder.config.vocab_size
    monkeypatch.setattr("secateur.calibration.walk._LOGIT_BYTES", two_windows)
    module = copy.deepcopy(decoder.module).requires_grad_(True)
    states = entering(decoder, module)
    for norm in norms(decoder, module):
        norm.register_forward_pre_hook(lambda _, args: args[0].retain_grad())
    (token_losses(module, windows).sum() / predictions(windows.tokens, windows.mask).sum()).backward()
    found = collected(visit_gradients, decoder, windows)
    assert list(found) == sorted(states, reverse=True)
    for point in states:
        assert gap(found[point], as_shown(decoder, states[point].grad, windows.mask)) < 1e-4


def test_blocks_are_announced_when_all_batches_have_passed(small):
    events = []
    visit_reading_points(
        small("llama", skeleton=True),
        draw_windows(),
        lambda point, *_: events.append(point),
        after_block=lambda index: events.append(f"block {index}"),
        options=RunOptions(batch_size=2),
    )
    assert events[:7] == [0, 1, 0, 1, "block 0", 2, 3]
    assert events[-3:] == ["block 3", 8, 8]


@pytest.mark.parametrize("sensitivity", [False, True])
def test_bases_are_those_of_the_states_of_their_blocks(sensitivity, small):
    decoder, windows = small("llama"), draw_windows()
    bases = find_bases(decoder, windows, 10, (0, 3), sensitivity=sensitivity)
    assert bases.starts == (0, 3)
    states = {
        point: unit_scale(one.double()) for point, one in collected(visit_reading_points, decoder, windows).items()
    }
    slopes = {point: one.double() for point, one in collected(visit_gradients, decoder, windows).items()}
    for points, found in zip((range(6), range(6, 9)), bases.directions, strict=True):
        covariance = sum(states[point].T @ states[point] for point in points)
        gradients = sum(slopes[point].T @ slopes[point] for point in points)
        expected = (
            sensitive_directions(covariance, gradients, 10) if sensitivity else principal_directions(covariance)[:, :10]
        )
        torch.testing.assert_close(projector(found), projector(expected), rtol=0, atol=1e-4)


def test_borders_stand_where_the_states_change():
    module = build("llama", blocks=8)
    with torch.no_grad():
        module.model.layers[2].mlp.down_proj.weight[0] *= 50
        module.model.layers[5].self_attn.o_proj.weight[1] *= 2000
    decoder, windows = open_model(module), draw_windows()
    assert find_borders(decoder, windows, 1) == (0,)
    assert find_borders(decoder, windows, 3) == (0, 3, 5)
    assert set(find_borders(decoder, windows, 2)) < {0, 3, 5}
    assert len(find_borders(decoder, windows, 8)) == 8


def test_every_block_has_the_last_basis_that_started():
    assert [basis_of((0, 2, 5), block) for block in range(7)] == [0, 0, 1, 1, 1, 2, 2]


# What is cut


def projected(decoder, bases):
    """A copy of the dense model in whose stream only the kept directions survive (RMSNorm models)."""
    module, family = copy.deepcopy(decoder.module), decoder.anatomy.family

    def keep(directions):
        matrix = projector(directions).float()
        return lambda _m, _a, output: output @ matrix

    find(module, family.embeddings[0]).register_forward_hook(keep(bases.of_block(0)))
    blocks = find(module, family.blocks)
    for index, block in enumerate(blocks):
        for name, directions in (
            ("attention_out", bases.of_block(index)),
            ("mlp_out", bases.of_block(index + 1)),
        ):
            next(present(block, getattr(family, name)))[1].register_forward_hook(keep(directions))
        block.register_forward_hook(keep(bases.of_block(index + 1)))
    return module


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma", "granite", "llama-bias"])
@pytest.mark.parametrize("starts", [(0,), (0, 1, 3)])
def test_what_is_not_kept_is_gone_and_nothing_else(name, starts, small):
    decoder, windows = small(name), draw_windows(side="left")
    bases = SharedBases(starts, tuple(orthonormal(32, 16, seed=seed) for seed in range(len(starts))))
    sliced = slice_with_shared_bases(decoder, windows, bases, stock=False, reconstruct=False)
    expected = forward(projected(decoder, bases), windows.tokens, windows.mask)[windows.mask]
    assert gap(forward(sliced.module, windows.tokens, windows.mask)[windows.mask], expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "opt", "gpt_neox", "mixtral", "cohere"])
@pytest.mark.parametrize("reconstruct", [False, True])
def test_full_width_leaves_the_logits_alone(name, reconstruct, small):
    decoder, windows = small(name), draw_windows(windows=5, side="left")
    bases = SharedBases((0, 2), (orthonormal(32, 32, seed=1), orthonormal(32, 32, seed=2)))
    sliced = slice_with_shared_bases(decoder, windows, bases, stock=False, reconstruct=reconstruct)
    expected = forward(decoder.module, windows.tokens, windows.mask)[windows.mask]
    found = forward(sliced.module, windows.tokens, windows.mask)[windows.mask]
    assert gap(found, expected) < (1e-3 if reconstruct else 1e-5)


@pytest.mark.parametrize("name", ["llama", "gpt_neox"])
@pytest.mark.parametrize("starts", [(0,), (0, 2), (0, 1, 3)])
def test_only_borders_carry_shortcuts(name, starts, small):
    decoder, windows = small(name), draw_windows()
    sliced = slice_with_shared_bases(
        decoder, windows, find_bases(decoder, windows, 16, starts, sensitivity=False), stock=False
    )
    assert set(sliced.config.widths) == {16}
    each = points_per_block(decoder)
    assert [place for place, matrix in enumerate(sliced.config.shortcuts) if matrix] == [
        each * start - 1 for start in starts[1:]
    ]
    for index, block in enumerate(sliced.block_list):
        names = {name for name, _ in block.named_parameters() if "shortcut" in name}
        assert names == ({"mlp_shortcut.weight"} if index + 1 in starts[1:] else set())
    assert torch.isfinite(forward(sliced.module, windows.tokens)).all()


@pytest.mark.parametrize("name", STOCK)
def test_stock_and_folded_results_are_the_same_model(name, small):
    decoder, windows = small(name), draw_windows(side="left")
    bases = find_bases(decoder, windows, 16, sensitivity=False)
    stock, folded = (slice_with_shared_bases(decoder, windows, bases, stock=kind) for kind in (True, False))
    expected = forward(folded.module, windows.tokens, windows.mask)[windows.mask]
    assert gap(forward(stock.module, windows.tokens, windows.mask)[windows.mask], expected) < 1e-4
    assert gap(forward(decoder.module, windows.tokens, windows.mask)[windows.mask], expected) > 1e-2


@pytest.mark.parametrize("name", STOCK)
def test_a_stock_result_is_of_the_same_class_and_reloads(name, small, tmp_path):
    decoder, windows = small(name), draw_windows()
    stock = slice_with_shared_bases(
        decoder, windows, SharedBases((0,), (orthonormal(32, 24),)), stock=True, reconstruct=False
    )
    assert type(stock.module) is type(decoder.module)
    assert stock.config.hidden_size == stock.hidden_size == 24
    assert decoder.config.hidden_size == 32
    counted = stock_stream_sizes(decoder).sizes_at([24] * (2 * BLOCKS + 1), [False] * (2 * BLOCKS))
    assert counted.blocks == stock.block_parameter_counts()
    assert counted.total == stock.parameter_count
    stock.module.save_pretrained(tmp_path)
    again, report = type(stock.module).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert torch.equal(forward(again, windows.tokens), forward(stock.module, windows.tokens))


@pytest.mark.parametrize(("name", "stock"), [("llama", True), ("mixtral", True), ("opt", False), ("gpt_neox", False)])
def test_a_skeleton_gives_the_same_model(name, stock, small):
    windows, starts = draw_windows(side="left"), (0,) if stock else (0, 2)
    whole, skeleton = small(name), small(name, skeleton=True)
    bases, same = (find_bases(decoder, windows, 16, starts) for decoder in (whole, skeleton))
    assert all(map(torch.equal, bases.directions, same.directions))
    assert find_borders(whole, windows, 2) == find_borders(skeleton, windows, 2)
    sliced, light = (slice_with_shared_bases(one, windows, bases, stock=stock) for one in (whole, skeleton))
    assert light.is_skeleton
    assert no_real_parameters(light.module)
    assert no_real_parameters(skeleton.module)
    assert torch.equal(walk(light, windows.tokens), forward(sliced.module, windows.tokens))
    assert light.fingerprint == sliced.fingerprint


def test_least_squares_and_sensitivity_both_pay_on_a_trained_model(bundled):
    text = open_texts("python-stdlib", bundled.tokenizer, windows=8, seq_len=128)
    held_out = open_texts("python-stdlib", bundled.tokenizer, windows=6, seq_len=96, split="held-out")
    coordinates = SharedBases((0,), (torch.eye(192, dtype=torch.float64)[:, :144],))
    principal, sensitive = (find_bases(bundled, text, 144, sensitivity=choice) for choice in (False, True))

    def loss(bases, *, reconstruct):
        sliced = slice_with_shared_bases(bundled, text, bases, stock=True, reconstruct=reconstruct)
        return plain_loss(sliced.module, held_out)

    plainly = loss(principal, reconstruct=False)
    repaired = loss(principal, reconstruct=True)
    best = loss(sensitive, reconstruct=True)
    assert plain_loss(bundled.module, held_out) < best < repaired < plainly
    assert plainly < loss(coordinates, reconstruct=False) - 0.3


# What is refused


def altered(name, **changes):
    row = VARIANTS[name]

    def config(blocks):
        changed = row.config(blocks)
        for key, value in changes.items():
            setattr(changed, key, value)
        return changed

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VARIANTS, name, dataclasses.replace(row, config=config))
        return open_model(build(name, blocks=2))


def with_heads(heads, hidden):
    return altered("llama", num_attention_heads=heads, num_key_value_heads=heads, hidden_size=hidden, head_dim=8)


def test_widths_are_multiples_of_the_heads_where_the_configuration_wants_it():
    decoder = with_heads(6, 48)
    assert width_step(decoder, 8) == 24
    assert width_step(decoder, 6) == 6
    with pytest.raises(StrictDataclassError, match="multiple of the number of attention heads"):
        config_of_width(decoder, 40)
    kept = config_of_width(decoder, 24)
    assert (kept.hidden_size, kept.head_dim, kept.num_attention_heads) == (24, 8, 6)
    assert kept.rms_norm_eps == decoder.config.rms_norm_eps
    assert width_step(with_heads(4, 32), 8) == 8


def test_a_configuration_that_ties_the_hidden_size_to_other_sizes_has_no_stock_width():
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0, **factors}
    decoder = altered("phi3", rope_parameters=rope)
    assert width_step(decoder, 8) is None
    with pytest.raises(ModelError, match="no stock model can hold its sliced states"):
        StockSlicing(decoder, orthonormal(32, 16))


def test_heads_keep_their_size_in_the_stock_model():
    decoder = with_heads(6, 48)
    windows = draw_windows()
    bases = SharedBases((0,), (orthonormal(48, 24),))
    stock, folded = (slice_with_shared_bases(decoder, windows, bases, stock=kind) for kind in (True, False))
    assert stock.block_list[0].self_attn.q_proj.weight.shape == (48, 24)
    assert gap(forward(stock.module, windows.tokens), forward(folded.module, windows.tokens)) < 1e-4


@pytest.mark.parametrize("name", ["opt", "gpt2", "gpt_neox", "cohere", "bloom"])
def test_a_stock_layernorm_is_refused(name, small):
    decoder = small(name, skeleton=True)
    bases = SharedBases((0,), (orthonormal(32, 16),))
    with pytest.raises(ModelError, match="no stock model can hold its sliced states"):
        slice_with_shared_bases(decoder, draw_windows(), bases, stock=True)
    assert width_step(decoder, 8) is None


def test_unsliceable_families_are_refused(small):
    for start in (
        lambda decoder, bases: StockSlicing(decoder, bases.directions[0]),
        lambda decoder, bases: slice_with_shared_bases(decoder, draw_windows(), bases, stock=False),
    ):
        with pytest.raises(ModelError, match="does not commute with a rotation"):
            start(small("gemma2", skeleton=True), SharedBases((0,), (orthonormal(32, 16),)))


@pytest.mark.parametrize("where", ["embed_tokens", "layers.1.mlp.up_proj"])
def test_damaged_weights_are_refused(where):
    module = build("llama", blocks=2)
    with torch.no_grad():
        module.model.get_submodule(where).weight[:] = math.nan
    decoder, windows = open_model(module), draw_windows()
    for measure in (
        lambda: find_bases(decoder, windows, 16, sensitivity=False),
        lambda: find_bases(decoder, windows, 16),
        lambda: slice_with_shared_bases(decoder, windows, SharedBases((0,), (orthonormal(32, 16),)), stock=True),
    ):
        with pytest.raises(NumericsError, match="NaN"):
            measure()


@pytest.mark.parametrize("stock", [True, False])
def test_table_and_head_of_a_skeleton_are_never_in_memory_together(stock, small, monkeypatch):
    skeleton, bases = small("llama", skeleton=True), SharedBases((0,), (orthonormal(32, 16),))
    seen = []

    def watched(tensor, *others):
        outer = ("model.embed_tokens.weight", "lm_head.weight")
        seen.append([name for name in outer if not skeleton.module.get_parameter(name).is_meta])
        return by_rows(tensor, *others)

    monkeypatch.setattr(hidden.stock if stock else hidden.outer, "by_rows", watched)
    slice_with_shared_bases(skeleton, draw_windows(), bases, stock=stock, reconstruct=False)
    assert [one for one in seen if one] == [["model.embed_tokens.weight"], ["lm_head.weight"]]
