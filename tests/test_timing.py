"""Estimates of time: what is measured of a model, and how the parts of the work add up."""

from dataclasses import fields

import pytest

from secateur.jobs import timing
from secateur.jobs.timing import Rate, Timing
from secateur.models.widths import block_widths
from secateur.plan.work import Work

TOKENS, WINDOW = 4096, 16
IN_BATCH = 512
"""Tokens that a block is run on."""


@pytest.fixture
def measured(monkeypatch):
    """Every measurement takes a second; how many there were."""
    runs = []

    def fastest(run, repeats=3):
        runs.append(run())
        return 1.0

    monkeypatch.setattr(timing, "fastest", fastest)
    return runs


def seconds(decoder, **work):
    return Timing(decoder, WINDOW).seconds(Work(**work), TOKENS)


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma3_text", "gpt2"])
@pytest.mark.parametrize("part", [one.name for one in fields(Work)])
def test_every_part_is_measured_on_every_family(part, name, tiny, measured):
    assert seconds(tiny(name), **{part: 1.0}) > 0
    assert len(measured) == (2 if part == "rotations" else 1), "nothing else is"


def test_blocks_and_tokens_are_counted(tiny, measured):
    blocks = tiny("llama").block_count
    assert seconds(tiny("llama"), forwards=1.0) == pytest.approx(blocks * TOKENS / IN_BATCH)
    assert seconds(tiny("llama"), forwards=2.5) == pytest.approx(2.5 * blocks * TOKENS / IN_BATCH)
    assert seconds(tiny("llama"), fits=1.0) == blocks, "whatever the number of tokens"
    decoder = tiny("qwen3_moe")
    assert seconds(decoder, orders=1.0) == decoder.block_count * block_widths(decoder, 0).experts


def test_a_skeleton_reads_each_block_once_a_pass(tiny, measured, monkeypatch):
    ticks = iter(range(100))
    monkeypatch.setattr(timing.time, "perf_counter", lambda: float(next(ticks)))
    skeleton = tiny("llama", skeleton=True)
    rate = Timing(skeleton, WINDOW).forwards
    assert rate == Rate(once=skeleton.block_count, token=skeleton.block_count / IN_BATCH)


def test_no_work_measures_nothing(tiny, measured):
    assert seconds(tiny("llama")) == 0
    assert measured == []


def test_work_adds_up():
    work = 2 * Work(1.0, sums=3.0) + 1.5
    assert work == Work(3.5, sums=6.0)
    assert Work.total([work, 1, Work(losses=1.0)]) == Work(4.5, losses=1.0, sums=6.0)
    assert Work.total([]) == Work()
