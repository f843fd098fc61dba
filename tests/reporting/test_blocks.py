"""The picture of the decoder: every block of the dense model in the state that the plans leave it in."""

import pytest

from secateur.plan.plan import ModelRef, Plan
from secateur.reporting.blocks import picture
from secateur.reporting.folders import read_folder


def plan(*steps, blocks=8):
    model = ModelRef(
        source="m", fingerprint="0", family="llama", block_parameters=(100,) * blocks, other_parameters=50
    )  # fmt: skip
    return Plan.model_validate({"version": "0", "model": model, "steps": list(steps)})


def states(*plans):
    return [block.state for block in picture(plans)]


DROP = {"kind": "drop-blocks", "method": "sleb"}


def test_each_kind_of_step():
    kept = ["kept"] * 8
    assert states(plan()) == kept
    assert states(plan(DROP | {"blocks": [2, 5]})) == [*kept[:2], "removed", *kept[:2], "removed", *kept[:2]]
    merged = {"kind": "merge-blocks", "method": "swm", "rule": "delta-sum", "windows": [[1, 3]]}
    assert states(plan(merged)) == ["kept", "merged", "absorbed", "absorbed", *kept[:4]]
    matrix = {"kind": "linear-replacement", "method": "replaceme", "ridge": 0.1, "windows": [[3, 4]]}
    assert states(plan(matrix)) == [*kept[:3], "replaced", "replaced", *kept[:3]]
    assert picture([plan(matrix)])[4].text == "replaced by a matrix in block 2"
    network = {"kind": "replace-blocks", "method": "streamline", "window": [2, 4], "network": "block"}
    assert states(plan(network | {"train_tokens": 9})) == ["kept", "kept", "network", "replaced", "replaced", *kept[:3]]


def test_later_steps_and_plans_count_the_blocks_that_are_left():
    both = plan(DROP | {"blocks": [0, 1]}, DROP | {"blocks": [0]})
    assert states(both)[:4] == ["removed", "removed", "removed", "kept"]
    second = plan({"kind": "merge-blocks", "method": "swm", "rule": "top", "windows": [[3, 4]]}, blocks=5)
    assert states(both, second) == [*["removed"] * 3, *["kept"] * 3, "merged", "absorbed"]


def test_widths_that_stay(study):
    (made,) = read_folder(study / "cells" / "flap-10").cells[0].plans
    (step,) = made.steps
    reduced = 0
    for block, keep, sizes in zip(picture([made]), step.widths, step.sizes.blocks, strict=True):
        gone = sizes.parameters_at(sizes.dense) - sizes.parameters_at(keep)
        assert block.share == pytest.approx(1 - gone / (sizes.parameters_at(sizes.dense) - sizes.fixed))
        assert block.state == ("reduced" if gone else "kept")
        assert not gone or f"{keep.channels} of {sizes.dense.channels} channels" in block.text
        reduced += gone > 0
    assert reduced


def test_attention_and_mlp_that_differ_are_shown_apart():
    dense = {"groups": 2, "queries": 2, "channels": 40}
    sizes = {"dense": dense, "group": 1, "query": 1, "channel": 1, "fixed": 0}
    widths = [dense, dense | {"groups": 0, "channels": 10}, dense | {"groups": 0, "channels": 0}]
    step = {
        "kind": "prune-width",
        "method": "obs-width",
        "widths": widths,
        "choose": "brain-surgeon",
        "stock": False,
        "sizes": {"blocks": [sizes] * 3, "other": 5},
    }
    kept, narrow, gone = picture([plan(step, blocks=3)])
    assert (kept.state, kept.branches) == ("kept", None)
    assert (narrow.state, narrow.branches) == ("reduced", (0.0, 0.25))
    assert "without its attention branch, 10 of 40 channels" in narrow.text
    assert gone.state == "removed"
