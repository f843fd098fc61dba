"""Targets in bytes and in times as fast, for depth methods and slicing methods (docs/evaluate.md)."""

import io

import pytest
import torch
from rich.console import Console

from secateur import Plan, make_plan, open_model, prune
from secateur.cli.tables import plan_summary
from secateur.data.windows import Windows
from secateur.errors import InputError
from secateur.evaluation.timing import BlockTimes
from secateur.methods import cost as scales
from secateur.methods import sample_models
from secateur.methods.branch_speed import branch_times
from secateur.methods.budget import Budget
from secateur.methods.cost import REQUEST, memory_cost
from secateur.models.widths import cache_size
from secateur.plan.amount import Amount, gigabytes, read_bytes, read_factor
from tiny_models import VOCABULARY, build

WINDOWS = Windows.of(torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1)))
METHODS = ("last-n", "sleb", "swm", "replaceme", "slicegpt", "stock-slicing")


def budget(**amount):
    return Budget.of(Amount.of(amount))


def bytes_of(decoder, context):
    """Weights and cache, counted on the model itself."""
    weights = sum(parameter.numel() for parameter in decoder.module.parameters())
    return decoder.saved_dtype.itemsize * (weights + sum(cache_size(decoder, context)))


def summary(plan):
    console = Console(width=400, file=io.StringIO())
    console.print(plan_summary(plan))
    return console.file.getvalue()


@pytest.mark.parametrize("method", METHODS)
def test_memory_is_the_largest_below(method, tiny):
    decoder = tiny("llama", dtype=torch.bfloat16)
    dense = bytes_of(decoder, 48)
    wanted = 0.8 * dense
    plan = make_plan(decoder, method=method, target_memory=wanted, context=48, texts=WINDOWS)
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert plan.counts_on["dense_bytes"] == dense
    assert plan.counts_on["bytes"] == bytes_of(pruned, 48) <= wanted
    assert plan.requested == {"target_memory": wanted, "context": 48}
    if pruned.block_count < decoder.block_count:
        block = 2 * (decoder.block_parameter_counts()[0] + cache_size(decoder, 48)[0])
        assert bytes_of(pruned, 48) + block > wanted
    assert gigabytes(plan.counts_on["bytes"]) in summary(plan)


def test_a_sliding_block_frees_less_cache():
    decoder = open_model(build("mistral-sliding"))
    weighed = memory_cost(decoder, 40)
    sizes = decoder.block_parameter_counts()
    assert weighed.blocks == tuple(4 * size + 4 * 2 * 16 * 8 for size in sizes), "a window of 8, two heads of 8"
    assert weighed.total == 4 * (decoder.parameter_count + 8 * 2 * 16 * 8)


@pytest.fixture
def clock(monkeypatch):
    """Each block takes a millisecond at full width and less in proportion, the rest 2 milliseconds."""

    def timed(decoder, request, *, kinds=None, repeats=5):
        share = decoder.hidden_size / 32 if decoder.config.model_type == "llama" else decoder.config.widths[0] / 32
        return BlockTimes((0.001 * share,) * decoder.block_count, 0.002, request)

    monkeypatch.setattr(scales, "time_blocks", timed)
    monkeypatch.setattr(sample_models, "time_blocks", timed)


@pytest.mark.parametrize("method", METHODS)
def test_speed_is_the_smallest_cut_that_reaches_it(method, tiny, clock):
    decoder = tiny("llama")
    plan = make_plan(decoder, method=method, target_speedup="1.3", texts=WINDOWS)
    assert plan.counts_on["dense_seconds"] == pytest.approx(0.010)
    assert plan.counts_on["speedup"] >= 1.3
    kept = len(plan.kept_blocks())
    if kept < 8:
        assert kept == 5, "2 + 5 of 2 + 8 is the most that is 1.3 times as fast"
        assert plan.counts_on["seconds"] == pytest.approx(0.007)
    else:
        (width,) = set(plan.steps[0].widths)
        assert width == 16, "the widest multiple of 8 below (10 / 1.3 − 2) / 8 of 32"
    assert f"{plan.counts_on['speedup']:.2f} times as fast" in summary(plan)
    assert Plan.model_validate_json(plan.to_json()) == plan


@pytest.mark.parametrize("network", ["block", "swiglu"])
def test_a_network_in_the_place_of_a_window(network, tiny, clock):
    decoder = tiny("llama")
    wanted = 0.7 * bytes_of(decoder, 64)
    settings = {"network": network, "inner": 16} if network == "swiglu" else {"network": network}
    given = {"method": "streamline", "settings": settings, "texts": WINDOWS}
    plan = make_plan(decoder, target_memory=wanted, context=64, **given)
    kept = len(plan.kept_blocks())
    attending = kept - (network == "swiglu")
    exact = 4 * (plan.parameters_after + attending * cache_size(decoder, 64)[0])
    assert plan.counts_on["bytes"] == exact <= wanted, "a network without attention has no cache"
    assert make_plan(decoder, target_speedup=1.3, **given).counts_on["speedup"] >= 1.3


def test_really_measured(tiny):
    decoder = tiny("llama")
    plan = make_plan(decoder, method="last-n", target_speedup=1.01)
    facts = plan.counts_on
    assert facts["prompt"] + facts["new_tokens"] <= 64
    assert len(set(facts["block_seconds"])) == 1, "blocks of one kind count the same"
    assert facts["dense_seconds"] == pytest.approx(sum(facts["block_seconds"]) + facts["other_seconds"], rel=1e-3)


def test_several_methods_share_a_target(tiny, clock):
    decoder = tiny("llama")
    spec = "last-n:0.5,stock-slicing:0.5"
    plan = make_plan(decoder, method=spec, target_memory=0.6 * bytes_of(decoder, 32), context=32, texts=WINDOWS)
    pruned = prune(decoder, plan, texts=WINDOWS)
    assert pruned.block_count < 8
    assert bytes_of(pruned, 32) == plan.counts_on["bytes"] <= 0.6 * bytes_of(decoder, 32)
    faster = make_plan(decoder, method=spec, target_speedup=1.6, texts=WINDOWS)
    assert faster.counts_on["speedup"] >= 1.6
    assert faster.counts_on["dense_seconds"] == pytest.approx(0.010), "that of the model before the first method"
    assert len(faster.steps) == 2


def test_what_cannot_be_reached(tiny, clock):
    decoder = tiny("llama")
    cases = [
        ({"target_memory": "1GB"}, "takes only .* as it is"),
        ({"target_memory": "10kB"}, "unreachable, dropping all 7 removable blocks leaves"),
        ({"target_memory": "100kB", "context": 1000}, "only 64 positions"),
        ({"target_speedup": 4}, r"unreachable, dropping all 7 removable blocks makes it 3\.33 times as fast"),
    ]
    for amount, message in cases:
        with pytest.raises(InputError, match=message):
            make_plan(decoder, method="last-n", **amount)
    with pytest.raises(InputError, match=r"2\.50 times as fast is possible"):
        make_plan(decoder, method="stock-slicing", target_speedup=4, texts=WINDOWS)


def test_reading():
    assert read_bytes("12GB") == 12e9
    assert read_bytes("1.5 GiB") == 1.5 * 2**30
    assert read_bytes(800) == 800
    assert read_factor("1.3x") == 1.3
    for wrong in ("12 apples", "-1GB", "0"):
        with pytest.raises(InputError, match="target-memory"):
            read_bytes(wrong)
    for wrong in ("1", "0.9", "fast", "inf"):
        with pytest.raises(InputError, match="target-speedup"):
            read_factor(wrong)
    with pytest.raises(InputError, match="only beside target-memory"):
        budget(remove=0.2, context=128)
    with pytest.raises(InputError, match="several amounts"):
        budget(target_memory="1GB", target_speedup=1.2)


@pytest.fixture
def branch_clock(monkeypatch, tmp_path):
    """Attention takes 0.6 milliseconds and an MLP 0.1, and 0.3 more in proportion to its width; the rest 2."""

    def timed(decoder, request, *, kinds=None, repeats=5):
        config, count = decoder.config, decoder.block_count
        heads = getattr(config, "heads", None) or [1] * count
        inner = getattr(config, "intermediate_sizes", None) or [config.intermediate_size] * count
        blocks = [
            0.0006 * bool(own) + bool(wide) * (0.0001 + 0.0003 * wide / 48)
            for own, wide in zip(heads, inner, strict=True)
        ]
        return BlockTimes(tuple(blocks), 0.002, request)

    monkeypatch.setenv("SECATEUR_CACHE", str(tmp_path))
    monkeypatch.setattr(scales, "time_blocks", timed)
    monkeypatch.setattr(sample_models, "time_blocks", timed)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("blockpruner", {}), ("branches", {}), ("obs-width", {"allocation": "global"}), ("obs-width", {"heads": "never"})],
)
def test_speed_by_what_each_branch_takes(method, settings, tiny, branch_clock):
    decoder = tiny("llama")
    given = {"method": method, "settings": settings, "texts": WINDOWS}
    plan = make_plan(decoder, target_speedup=1.15, **given)
    (step,) = plan.steps
    seconds = 0.002 + sum(
        0.0006 * bool(one.groups) + bool(one.channels) * (0.0001 + 0.0003 * one.channels / 48) for one in step.widths
    )
    # between a quarter of the width and none the table draws a line
    assert plan.counts_on["seconds"] == pytest.approx(seconds, rel=0.02)
    assert plan.counts_on["speedup"] >= 1.15
    assert plan.counts_on["dense_seconds"] == pytest.approx(0.010)


def test_the_table_of_branches_is_measured_once(tiny, branch_clock, monkeypatch, tmp_path):
    decoder = tiny("llama")
    first = branch_times(decoder, REQUEST)
    assert first.mlp == pytest.approx((0.6, 0.775, 0.85, 0.925, 1.0))
    assert first.no_attention == pytest.approx(0.4)
    assert first.share(0.5, 0.75) == pytest.approx(0.925 - 0.3)
    monkeypatch.setattr(sample_models, "time_blocks", None)
    assert branch_times(decoder, REQUEST) == first
    (path,) = (tmp_path / "times").iterdir()
    path.write_text('{"mlp": [1], "no_attention": 1}')
    with pytest.raises(TypeError):
        branch_times(decoder, REQUEST)
