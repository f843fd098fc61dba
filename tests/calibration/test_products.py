"""Sums of products: float32 products of some tokens, added up in float64, against float64 throughout."""

import pytest
import torch

from secateur.calibration.inputs import Moments
from secateur.calibration.products import ROWS, add_product, add_upper, at_work, mirror_upper


@pytest.fixture
def tokens():
    """Inputs of very different size, as in a transformer: one is a thousand times as large as the others."""
    torch.manual_seed(0)
    inputs = torch.randn(3 * ROWS + 7, 300) * torch.logspace(-2, 1, 300)
    inputs[:, 17] += 1000
    return inputs


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_sums_are_those_of_float64(tokens, dtype):
    weight, inputs = torch.rand(len(tokens)), at_work(tokens.to(dtype), torch.device("cpu"))
    assert inputs.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    weighted = inputs * weight[:, None].to(inputs)
    exact = (inputs.double() * weight[:, None].double()).T @ inputs.double()
    scale = exact.diagonal().sqrt()
    gram, cross = torch.zeros(2, 300, 300, dtype=torch.float64)
    add_upper(gram, weighted, inputs)
    mirror_upper(gram)
    add_product(cross, weighted, inputs)
    near = 1e-12 if dtype == torch.float64 else 3e-6
    for found in (gram, cross):
        assert float(((found - exact).abs() / (scale[:, None] * scale)).max()) < near
    assert torch.equal(gram, gram.T)


def test_many_small_products_lose_nothing_more(tokens):
    inputs = at_work(tokens, torch.device("cpu"))
    once, often = torch.zeros(2, 300, 300, dtype=torch.float64)
    add_product(once, inputs, inputs)
    for _ in range(200):
        add_product(often, inputs, inputs)
    assert torch.allclose(often, 200 * once, rtol=1e-13, atol=0)


def test_moments_are_symmetric_whenever_they_are_read(tokens):
    sums, half = Moments.zero(300, torch.device("cpu")), len(tokens) // 2
    weight = torch.rand(len(tokens))
    for some in (slice(0, half), slice(half, None)):
        sums.add(tokens[some], weight[some])
        exact = (tokens[: some.stop].double() * weight[: some.stop, None]).T @ tokens[: some.stop].double()
        assert torch.equal(sums.gram, sums.gram.T)
        assert torch.allclose(sums.gram, exact, rtol=1e-4, atol=3e-6 * float(exact.diagonal().max()))
    assert torch.equal((sums + sums).gram, 2 * sums.gram)
