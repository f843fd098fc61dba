"""The page as text: nothing is loaded, nothing from files is markup, and all that was written is there."""

import json
import re
from html.parser import HTMLParser

import pytest

import secateur
from secateur.reporting.blocks import picture
from secateur.reporting.folders import read_folder
from secateur.reporting.page import report

SECTIONS = ["ranking", "quality", "plan", "cells", "tasks", "healing", "redundancy", "generations", "commands"]


class Page(HTMLParser):
    """What is on a page: elements with their attributes, and the text outside scripts and styles."""

    def __init__(self, path):
        super().__init__()
        self.elements, self.text, self.open = [], [], []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        self.open.append(tag)

    def handle_endtag(self, tag):
        if tag in self.open:
            del self.open[len(self.open) - 1 - self.open[::-1].index(tag) :]

    def handle_data(self, data):
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    def all(self, tag, **wanted):
        return [found for name, found in self.elements if name == tag and wanted.items() <= found.items()]


@pytest.fixture(scope="module")
def read(page):
    return Page(page)


def sections(page):
    return [found["id"] for found in Page(page).all("section")]


def test_every_section_is_there(read, page):
    assert sections(page) == SECTIONS
    title = re.search(r"<title>(.*?)</title>", page.read_text())[1]
    assert re.match(r"\S+ preserves tiny&lt;i&gt;&amp; best: \d\.\d\d × the dense perplexity with", title)


def test_nothing_is_loaded_and_the_browser_is_told_so(read):
    (policy,) = read.all("meta", **{"http-equiv": "Content-Security-Policy"})
    assert policy["content"].startswith("default-src 'none'")
    assert not {tag for tag, _ in read.elements} & {"link", "img", "iframe", "object", "base"}
    assert not [found for _, found in read.elements if {"src", "action", "srcset"} & set(found)]
    assert [found["href"] for found in read.all("a")] == ["#main"]


def test_nothing_from_files_is_markup(read, page):
    text = "".join(read.text)
    for said in ("tiny<i>&", "a<b>", "</script><img src=x onerror=alert(1)>", "9 blocks <cannot> go"):
        assert said in text
    assert not {tag for tag, _ in read.elements} & {"i", "cannot"}
    figures = re.search(r'<script type="application/json" id="figures">(.*?)</script>', page.read_text(), re.DOTALL)[1]
    assert "<" not in figures
    assert set(json.loads(figures)) == {
        "quality-size", "quality-speed", "influence", "cosine", "cka-linear", "cka-rbf", "accuracy", "healing"
    }  # fmt: skip


def test_one_row_per_cell_and_failures_are_told(read, study):
    cells = sorted(folder.name for folder in (study / "cells").iterdir())
    rows = [found["data-value"] for found in read.all("th", scope="row")]
    assert sorted(rows[: len(cells)]) == cells
    assert rows[len(cells)] == "dense"
    assert "failed at plan. InputError" in "".join(read.text)


def test_plans_are_drawn_block_by_block(read, study):
    strips = [found for found in read.all("ol") if found.get("class") == "strip"]
    blocks = [found for found in read.all("li") if found.get("class", "").startswith("block ")]
    assert [found["style"] for found in strips] == ["--count: 8"] * 5  # the healed cell is drawn once, with the other
    assert len(blocks) == 5 * 8
    states = [found["class"].split()[1] for found in blocks]
    flap = picture(read_folder(study / "cells" / "flap-10").cells[0].plans)
    assert any(block.share < 1 for block in flap)
    assert states.count("removed") == 3
    assert states.count("replaced") == 1
    assert states.count("reduced") == sum(block.share < 1 for block in flap)
    assert states.count("absorbed") == 2


def test_commands_make_each_cell_again(study, page):
    text = "".join(Page(page).text)
    source = read_folder(study).model
    quoted = f"'{source}'"
    assert f"secateur plan {quoted} --method shortgpt --blocks 2 --texts tokens --windows 2 --seq-len 16" in text
    assert "secateur heal cut/ --with lora --texts tokens --tokens 640 --seq-len 16" in text
    assert f"secateur eval healed/ --against {quoted} --texts tokens --windows 2 --seq-len 16 --tasks cloze" in text
    assert "--batch-sizes 1 --prompts 4 --new-tokens 2 --repeats 2" in text
    assert "secateur run study/cells/sleb-9/recipe.yaml" in text


def test_a_single_run_a_checkpoint_and_scores_alone(study, tmp_path):
    cell = study / "cells" / "shortgpt-2-lora"
    assert sections(report(cell, tmp_path / "run.html")) == [
        "plan", "cells", "tasks", "healing", "generations", "commands"
    ]  # fmt: skip
    assert "shortgpt + lora keeps perplexity at" in (tmp_path / "run.html").read_text()
    assert sections(report(cell / "healed", tmp_path / "healed.html")) == ["plan", "cells", "healing", "commands"]
    alone = tmp_path / "scores"
    alone.mkdir()
    (alone / "scores.json").write_text((study / "scores.json").read_text())
    written = report(alone)
    assert written == alone / "report.html"
    assert sections(written) == ["redundancy"]
    assert "depends least on blocks" in written.read_text()
    assert sections(report(study / "cells" / "sleb-9", tmp_path / "failed.html")) == ["cells", "commands"]


def test_without_plots_no_library_is_carried(study, tmp_path):
    plain = report(study / "cells" / "shortgpt-1" / "cut", tmp_path / "plain.html")
    assert plain.stat().st_size < 50_000


def test_it_is_public():
    assert secateur.report is report
