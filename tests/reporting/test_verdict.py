"""Prices, the Pareto front and who won, against brute force and by hand."""

import math
from pathlib import Path

import numpy as np
import pytest

from secateur.evaluation.metrics.perplexity import GEOMEAN
from secateur.evaluation.results import Result
from secateur.reporting.cells import Cell, Contents, Measured
from secateur.reporting.folders import read_folder
from secateur.reporting.tables import cells_table
from secateur.reporting.trade_offs import _apart, size_front
from secateur.reporting.verdict import Row, pareto, rankings, rows_of, verdict


def test_the_front_against_brute_force():
    for seed in range(20):
        points = [tuple(map(float, point)) for point in np.random.default_rng(seed).integers(0, 6, (25, 2))]
        expected = [
            not any(a <= x and b <= y and (a < x or b < y) for a, b in points)
            for x, y in points
        ]  # fmt: skip
        assert pareto(points) == expected


def test_the_front_of_a_study(study):
    rows = rows_of(read_folder(study))
    measured = [row for row in rows if row.ratio is not None]
    others = [(0.0, 1.0), *((row.cell.removed, row.ratio) for row in measured)]
    expected = {
        row.cell.name
        for row in measured
        if not any(
            removed >= row.cell.removed and ratio <= row.ratio and (removed, ratio) != (row.cell.removed, row.ratio)
            for removed, ratio in others
        )
    }
    assert {row.cell.name for row in size_front(rows)} == expected


def test_price_is_loss_by_parameters_removed(study):
    contents = read_folder(study)
    row = next(row for row in rows_of(contents) if row.cell.name == "shortgpt-2")
    (dense,) = (one.value for one in contents.dense.perplexities().values())
    assert row.price == pytest.approx(100 * math.log(row.perplexity / dense) / (100 * row.cell.removed))
    assert (row.accuracy, row.lost, row.stability, row.flips) == (0.5, 0.0, 0.75, 0.25)
    assert row.decode > 0


def on(source, value, fingerprint=None, measure="perplexity"):
    facts = {"role": "model", "model": "m", "fingerprint": "f", "parameters": 1, "blocks": 1}
    return Result(measure=measure, value=value, texts={"source": source, "fingerprint": fingerprint or source}, **facts)


def test_several_sources_count_alike_and_each_is_shown():
    dense = Measured(results=(on("code", 4.0), on("docs/prose.txt", 20.0)))
    read = (on("code", 8.0), on("docs/prose.txt", 160.0), on("code,docs/prose.txt", 4.0, measure=GEOMEAN))
    cells = (
        Cell(name="a", folder=Path(), method="a", removed=0.2, measured=Measured(results=read)),
        Cell(name="b", folder=Path(), method="b", removed=0.2, measured=Measured(results=read[:1])),
        Cell(name="c", folder=Path(), method="c", measured=Measured(results=(read[0], on("docs/prose.txt", 1.0, "x")))),
    )
    by_name = {
        row.cell.name: row
        for row in rows_of(Contents(kind="compare", folder=Path(), model="m", cells=cells, dense=dense))
    }
    assert by_name["a"].ratios == {"code": 2.0, "docs/prose.txt": 8.0}
    assert by_name["a"].ratio == pytest.approx(4.0)
    assert by_name["a"].perplexity == pytest.approx((8 * 160) ** 0.5)
    assert by_name["b"].ratio == 2.0
    assert by_name["c"].ratio is None, "the second text is another one than the dense model's"
    table = cells_table(list(by_name.values()), [])
    names = [name for name, _, _ in table.columns]
    assert names == ["method", "removed", "perplexity", "× dense", "price", "× dense, code", "× dense, prose.txt"]
    (line,) = (line for line in table.lines if line.name == "a")
    assert [entry.text for entry in line.entries[-2:]] == ["2.000", "8.000"]


def made(method, amount, price, healing=None):
    cell = Cell(name=f"{method}-{amount}", folder=Path(), method=method, amount=amount, healing=healing, removed=0.2)
    return Row(cell=cell, ratio=1 + price / 10, quality=1 + price / 10, price=price)


def test_who_wins():
    rows = [made("a", "10 %", 1.0), made("b", "10 %", 2.0), made("a", "20 %", 3.0), made("b", "20 %", 2.5)]
    rows += [made("a", "30 %", 4.0), made("b", "30 %", 5.0), made("b", "30 %", 0.5, healing="lora")]
    contents = Contents(kind="compare", folder=Path(), model="org/model", cells=tuple(row.cell for row in rows))
    said = verdict(contents, rows)
    assert said.headline == "a preserves org/model best"
    assert said.best is rows[4]
    assert "Elsewhere b at 20 % comes first. Best with training: b + lora, 1.05 ×" in said.sentence
    assert [one.healed for one in rankings(rows)] == [False, False, False, True]


def test_failed_cells_alone_win_nothing(study):
    contents = read_folder(study / "cells" / "sleb-9")
    said = verdict(contents, rows_of(contents))
    assert contents.cells[0].amount == "90 %"
    assert said.headline == "sleb (protect_last=2) failed at plan"
    assert said.sentence == "9 blocks <cannot> go"


def test_labels_move_apart_as_little_as_can_be():
    assert _apart([0.0, 50.0], 10) == [0.0, 50.0]
    assert _apart([0.0, 0.0, 0.0], 10) == [-10.0, 0.0, 10.0]
    assert _apart([0.0, 4.0, 100.0], 10) == [-3.0, 7.0, 100.0]
