"""Running sums against the formulas of their docstrings, written out token by token in float64."""

import itertools
import math
import statistics

import numpy as np
import pytest
import torch

from oracles import draw_windows, plain_states
from secateur.calibration.statistics import AngularSums, CkaSums, CosineSums, real_tokens, unbiased_hsic
from secateur.calibration.walk import states_by_batch
from secateur.data.windows import Windows
from secateur.errors import InputError, NumericsError
from secateur.run_options import RunOptions

# The formulas


def cosine(a, b):
    return float(a @ b / math.sqrt((a @ a) * (b @ b)))


def mean_cosines(states):
    """E_t cos(X^a_t, X^b_t); states are S arrays (tokens, d)."""
    tokens = range(len(states[0]))
    return np.array([[np.mean([cosine(a[t], b[t]) for t in tokens]) for b in states] for a in states])


def mean_angles(last):
    """Mean over windows of arccos(cos)/π; `last` are S arrays (windows, d)."""
    rows = range(len(last[0]))

    def angle(a, b):
        return math.acos(min(1.0, max(-1.0, cosine(a, b)))) / math.pi

    return np.array([[np.mean([angle(a[w], b[w]) for w in rows]) for b in last] for a in last])


def relative_magnitudes(states):
    """E_t ‖f(X) − X‖ / ‖f(X)‖."""
    return [
        np.mean([np.linalg.norm(y - x) / np.linalg.norm(y) for x, y in zip(before, after, strict=True)])
        for before, after in itertools.pairwise(states)
    ]


def slow_hsic(k, m):
    """Unbiased HSIC as a U-statistic: mean over distinct i, j, q, r of K_ij (M_ij + M_qr − 2 M_iq)."""
    i, j, q, r = np.array(list(itertools.permutations(range(len(k)), 4))).T
    return float(np.mean(k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q])))


def linear_kernel(x):
    return np.array([[float(a @ b) for b in x] for a in x])


def rbf_kernel(x, width):
    return np.array([[math.exp(-float((a - b) @ (a - b)) / (2 * width**2)) for b in x] for a in x])


def median_distance(x):
    return statistics.median_low(float(np.linalg.norm(a - b)) for a, b in itertools.combinations(x, 2))


def slow_cka(outputs, size, kind):
    """Minibatch CKA: ratio of HSICs averaged over minibatches; RBF width from the first one."""
    count = len(outputs[0]) // size
    parts = [[x[n * size : (n + 1) * size] for n in range(count)] for x in outputs]
    widths = [median_distance(x[0]) for x in parts]

    def kernel(layer, n):
        return linear_kernel(parts[layer][n]) if kind == "linear" else rbf_kernel(parts[layer][n], widths[layer])

    kernels = [[kernel(layer, n) for n in range(count)] for layer in range(len(outputs))]

    def hsic(a, b):
        return np.mean([slow_hsic(kernels[a][n], kernels[b][n]) for n in range(count)])

    own = [hsic(layer, layer) for layer in range(len(outputs))]
    every = range(len(outputs))
    return np.array([[hsic(a, b) / math.sqrt(own[a] * own[b]) if a != b else 1.0 for b in every] for a in every])


# What they are compared on


@pytest.fixture(params=[None, "right", "left"])
def windows(request):
    return draw_windows(side=request.param)


def real_arrays(decoder, windows):
    """States of real tokens by a plain forward pass, S arrays (tokens, d) in float64."""
    states = plain_states(decoder, windows.tokens, windows.mask)
    mask = torch.ones_like(windows.tokens, dtype=torch.bool) if windows.mask is None else windows.mask
    return [state[mask].double().numpy() for state in states]


def last_arrays(decoder, windows):
    states = plain_states(decoder, windows.tokens, windows.mask)
    if windows.mask is None:
        last = [windows.seq_len - 1] * len(windows)
    else:
        last = [max(i for i in range(windows.seq_len) if row[i]) for row in windows.mask]
    return [np.stack([state[w, t].double().numpy() for w, t in enumerate(last)]) for state in states]


def fed(decoder, windows, batch_size, *, cka_size=16):
    cosines, angles = CosineSums(decoder.block_count + 1), AngularSums(decoder.block_count + 1)
    cka = CkaSums(windows.token_count, size=cka_size)
    for batch, states in states_by_batch(decoder, windows, options=RunOptions(batch_size=batch_size)):
        flat = real_tokens(states, batch.mask)
        cosines.update(flat)
        angles.update(states, batch.mask)
        cka.update(flat[1:])
    return cosines, angles, cka


def pieces(outputs, *cuts):
    """Feed tokens in uneven pieces."""
    bounds = [0, *cuts, len(outputs[0])]
    return [[x[a:b] for x in outputs] for a, b in itertools.pairwise(bounds)]


def random_outputs(layers=3, tokens=32, width=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shared = torch.randn(tokens, width, generator=generator)
    return [shared + 0.7 * torch.randn(tokens, width, generator=generator) for _ in range(layers)]


# Cosines, angles, magnitudes


@pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_sums_against_the_formulas(windows, batch_size, skeleton, tiny):
    arrays, last = real_arrays(tiny("llama", blocks=4), windows), last_arrays(tiny("llama", blocks=4), windows)
    cosines, angles, _ = fed(tiny("llama", blocks=4, skeleton=skeleton), windows, batch_size)
    np.testing.assert_allclose(cosines.result(), mean_cosines(arrays), atol=1e-5)
    np.testing.assert_allclose(cosines.relative_magnitude(), relative_magnitudes(arrays), rtol=1e-5)
    np.testing.assert_allclose(angles.result().fill_diagonal_(0), mean_angles(last) * (1 - np.eye(5)), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "opt-post-norm", "qwen3_moe"])
def test_sums_of_other_families(name, tiny):
    windows = draw_windows(side="right")
    arrays = real_arrays(tiny(name), windows)
    cosines, angles, _ = fed(tiny(name), windows, 2)
    np.testing.assert_allclose(cosines.result(), mean_cosines(arrays), atol=1e-5)
    assert cosines.result().shape == angles.result().shape == (9, 9)


def test_diagonals_and_symmetry(tiny):
    cosines, angles, cka = fed(tiny("llama"), draw_windows(), 4)
    for matrix, own in ((cosines.result(), 1), (angles.result(), 0), (cka.result("linear"), 1), (cka.result("rbf"), 1)):
        assert matrix.dtype == torch.float64
        assert torch.equal(matrix.diagonal(), torch.full_like(matrix.diagonal(), own))
        torch.testing.assert_close(matrix, matrix.T, rtol=0, atol=1e-6)
    assert angles.result().min() >= 0
    assert angles.result().max() <= 1


def test_large_states_in_chunks(monkeypatch):
    states = random_outputs(tokens=50)
    whole = CosineSums(3)
    whole.update(states)
    monkeypatch.setattr("secateur.calibration.statistics._CHUNK_BYTES", 7 * 4 * 5 * 3)
    chunked = CosineSums(3)
    chunked.update(states)
    torch.testing.assert_close(chunked.result(), whole.result(), rtol=0, atol=1e-7)
    torch.testing.assert_close(chunked.relative_magnitude(), whole.relative_magnitude(), rtol=1e-6, atol=0)


def test_massive_activations_do_not_overflow():
    """Trained models hold a few coordinates in the thousands; half precision could not even square them."""
    x = torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    x[0, 0] = 30000
    states = [x.half(), (x * 1.5).half(), (x + 1).half()]
    sums = CosineSums(3)
    sums.update(states)
    expected = mean_cosines([state.double().numpy() for state in states])
    np.testing.assert_allclose(sums.result(), expected, atol=1e-5)


def test_inputs_are_left_alone():
    states = random_outputs()
    before = [state.clone() for state in states]
    CosineSums(3).update(states)
    CkaSums(32).update(states)
    AngularSums(3).update([state[None] for state in states], None)
    assert all(torch.equal(state, old) for state, old in zip(states, before, strict=True))


def test_angles_take_the_last_real_token_only():
    generator = torch.Generator().manual_seed(0)
    states = [torch.randn(3, 4, 5, generator=generator) for _ in range(2)]
    mask = torch.tensor([[1, 1, 0, 0], [0, 1, 1, 1], [1, 0, 1, 0]]).bool()
    angles = AngularSums(2)
    angles.update(states, mask)
    expected = mean_angles([np.stack([s[w, t].double().numpy() for w, t in enumerate((1, 3, 2))]) for s in states])
    assert angles.result()[0, 1] == pytest.approx(expected[0, 1], abs=1e-9)


def test_angle_is_taken_before_the_mean():
    """Directions at 0° and 90°: the mean angle is a quarter turn's half, the angle of the mean cosine is not."""
    x = torch.tensor([[[1.0, 0.0]], [[1.0, 0.0]]])
    y = torch.tensor([[[1.0, 0.0]], [[0.0, 1.0]]])
    angles = AngularSums(2)
    angles.update([x, y], None)
    assert angles.result()[0, 1] == pytest.approx(0.25, abs=1e-12)


# Padding


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding_never_counts(side, tiny):
    """Llama's rotary positions are relative, so padding on either side leaves the real tokens as they are."""
    decoder = tiny("llama", blocks=4)
    padded = draw_windows(side=side)
    together = fed(decoder, padded, 4)
    states = CosineSums(5), AngularSums(5), CkaSums(padded.token_count, size=16)
    for row, mask in zip(padded.tokens, padded.mask, strict=True):
        document = Windows.of(row[mask][None])
        for _, found in states_by_batch(decoder, document):
            flat = real_tokens(found, None)
            states[0].update(flat)
            states[1].update(found, None)
            states[2].update(flat[1:])
    torch.testing.assert_close(together[0].result(), states[0].result(), rtol=0, atol=1e-5)
    torch.testing.assert_close(together[0].relative_magnitude(), states[0].relative_magnitude(), rtol=1e-4, atol=0)
    torch.testing.assert_close(together[1].result(), states[1].result(), rtol=0, atol=1e-5)
    for kernel in ("linear", "rbf"):
        torch.testing.assert_close(together[2].result(kernel), states[2].result(kernel), rtol=0, atol=1e-4)


def test_real_tokens():
    state = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[True, True, False], [False, True, True]])
    (flat,) = real_tokens([state], mask)
    assert flat.tolist() == [[0, 1], [2, 3], [8, 9], [10, 11]]
    assert real_tokens([state], None)[0].shape == (6, 2)


# CKA


@pytest.mark.parametrize("samples", [4, 5, 9])
def test_unbiased_hsic_is_the_u_statistic(samples):
    generator = torch.Generator().manual_seed(samples)
    kernels = torch.stack([(x := torch.randn(samples, 3, generator=generator).double()) @ x.T for _ in range(3)])
    found = unbiased_hsic(kernels)
    for a, b in itertools.product(range(3), repeat=2):
        assert float(found[a, b]) == pytest.approx(
            slow_hsic(kernels[a].numpy(), kernels[b].numpy()), rel=1e-9, abs=1e-12
        )


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
@pytest.mark.parametrize(
    ("tokens", "size", "cuts"), [(12, 12, ()), (24, 8, (3, 10, 11)), (30, 8, (1, 20)), (9, 256, (4,))]
)
def test_cka_against_the_slow_one(tokens, size, cuts, kernel):
    outputs = random_outputs(tokens=tokens)
    size_used = min(size, tokens)
    sums = CkaSums(tokens, size=size)
    chosen = sums._chosen.tolist()
    assert chosen == sorted(set(chosen))
    assert len(chosen) == tokens // size_used * size_used
    for part in pieces(outputs, *cuts):
        sums.update(part)
    expected = slow_cka([x[chosen].double().numpy() for x in outputs], size_used, kernel)
    np.testing.assert_allclose(sums.result(kernel), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_of_a_model(kernel, tiny):
    windows = draw_windows(windows=3, positions=8, side=None)
    *_, cka = fed(tiny("llama", blocks=4), windows, 2, cka_size=12)
    arrays = real_arrays(tiny("llama", blocks=4), windows)
    np.testing.assert_allclose(cka.result(kernel), slow_cka(arrays[1:], 12, kernel), atol=1e-5)


def test_cka_does_not_see_rotation_scale_or_shift():
    (x,) = random_outputs(layers=1, tokens=24)
    turn, _ = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))
    sums = CkaSums(24, size=12)
    sums.update([x, 3 * x @ turn + 2])
    for kernel in ("linear", "rbf"):
        assert float(sums.result(kernel)[0, 1]) == pytest.approx(1.0, abs=1e-5)


def test_cka_of_unrelated_outputs_is_about_zero():
    generator = torch.Generator().manual_seed(0)
    sums = CkaSums(2048, size=64)
    sums.update([torch.randn(2048, 6, generator=generator) for _ in range(2)])
    for kernel in ("linear", "rbf"):
        assert abs(float(sums.result(kernel)[0, 1])) < 0.05


def test_cka_looks_at_a_limited_seeded_choice():
    def sums(**settings):
        found = CkaSums(100, **{"limit": 40, "size": 16, **settings})
        return found._chosen.tolist()

    assert len(sums()) == 32
    assert sums() == sums()
    assert sums() != sums(seed=1)
    assert len(CkaSums(10_000)._chosen) == 4096
    assert max(CkaSums(10_000)._chosen) > 9_000


def test_tokens_that_are_not_chosen_do_not_matter():
    outputs = random_outputs(tokens=40)
    sums = CkaSums(40, limit=20, size=10)
    other = [x.clone() for x in outputs]
    left_out = [t for t in range(40) if t not in sums._chosen.tolist()]
    for x in other:
        x[left_out] = 100.0
    again = CkaSums(40, limit=20, size=10)
    for part in pieces(outputs, 7, 13):
        sums.update(part)
    again.update(other)
    assert torch.equal(sums.result("rbf"), again.result("rbf"))
    np.testing.assert_allclose(
        sums.result("linear"), slow_cka([x[sums._chosen].double().numpy() for x in outputs], 10, "linear"), rtol=1e-9
    )


@pytest.mark.parametrize("tokens", [0, 1, 3])
def test_cka_of_too_few_tokens(tokens):
    with pytest.raises(InputError, match="at least 4 tokens"):
        CkaSums(tokens)


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_cka_of_constant_outputs_is_undefined(kernel):
    outputs = random_outputs(tokens=12)
    outputs[1] = torch.ones(12, 5)
    sums = CkaSums(12)
    sums.update(outputs)
    with pytest.raises(NumericsError, match="block 1"):
        sums.result(kernel)
