"""Steps say what they remove in units; a new kind of step is one class, and report and summary follow."""

from typing import Literal

import pytest

from secateur import make_plan
from secateur.errors import InputError
from secateur.methods.planning import model_ref
from secateur.plan.plan import ModelRef, Plan
from secateur.plan.step import Sizes, Step
from secateur.plan.units import Removal, UnitKind, summary
from secateur.plan.width import BlockSizes, Widths, WidthSizes
from secateur.reporting.blocks import picture
from tiny_models import VARIANTS

REF = ModelRef(
    source="somewhere",
    fingerprint="f" * 64,
    family="llama",
    block_parameters=(100, 100, 100),
    other_parameters=50,
    units={UnitKind.ATTENTION: (1, 1, 1), UnitKind.MLP: (1, 1, 1), UnitKind.EXPERT: (8, 8, 8)},
)


class RemoveBranch(Step):
    """A step to come: attention or MLP of some blocks goes."""

    kind: Literal["test-remove-branch"] = "test-remove-branch"
    branch: Literal["attention", "mlp"]
    blocks: tuple[int, ...]
    parameters: tuple[int, ...]

    def kept_blocks(self, count):
        return tuple(range(count))

    def sizes_after(self, sizes):
        gone = dict(zip(self.blocks, self.parameters, strict=True))
        blocks = tuple(one - gone.get(block, 0) for block, one in enumerate(sizes.blocks))
        kind = UnitKind.ATTENTION if self.branch == "attention" else UnitKind.MLP
        left = tuple(0 if block in gone else count for block, count in enumerate(sizes.units[kind]))
        return Sizes(blocks, sizes.other, {**sizes.units, kind: left})

    def describe(self):
        return "removes", f"{self.branch} of blocks {', '.join(map(str, self.blocks))}"


class KeepExperts(Step):
    """A step to come: each block keeps some of its experts."""

    kind: Literal["test-keep-experts"] = "test-keep-experts"
    experts: tuple[tuple[int, ...], ...]
    each: int

    def kept_blocks(self, count):
        return tuple(range(count))

    def sizes_after(self, sizes):
        left = tuple(len(kept) for kept in self.experts)
        gone = [before - now for before, now in zip(sizes.units[UnitKind.EXPERT], left, strict=True)]
        blocks = tuple(one - count * self.each for one, count in zip(sizes.blocks, gone, strict=True))
        return Sizes(blocks, sizes.other, {**sizes.units, UnitKind.EXPERT: left})

    def describe(self):
        return "keeps", f"{min(map(len, self.experts))} experts or more in each block"


BRANCH = {
    "kind": "test-remove-branch",
    "method": "m",
    "branch": "attention",
    "blocks": [1],
    "parameters": [40],
}
EXPERTS = {"kind": "test-keep-experts", "method": "m", "experts": [[0, 1], [3], list(range(8))], "each": 10}


def plan_of(*steps):
    return Plan.model_validate({"version": "0", "model": REF, "steps": list(steps)})


def test_attention_of_one_block():
    plan = plan_of(BRANCH)
    assert plan.parameters_after == 350 - 40
    assert plan.removes() == (Removal(unit=UnitKind.ATTENTION, count=1, total=1, block=1),)
    assert summary(plan.removes()) == "1 attention branch in 1 block"
    block = picture([plan])[1]
    assert (block.state, block.text) == ("reduced", "without its attention branch")
    assert block.share == pytest.approx(0.6)
    assert [one.state for one in picture([plan])] == ["kept", "reduced", "kept"]
    assert Plan.model_validate_json(plan.to_json()) == plan


def test_some_experts():
    plan = plan_of(EXPERTS)
    assert plan.parameters_after == 350 - 130
    assert summary(plan.removes()) == "13 experts in 2 blocks"
    assert [block.text for block in picture([plan])] == ["2 of 8 experts", "1 of 8 experts", "kept"]


def test_kinds_mix_and_count_what_the_step_before_left():
    plan = plan_of({"kind": "drop-blocks", "method": "m", "blocks": [0]}, BRANCH, BRANCH | {"branch": "mlp"})
    assert plan.sizes_after() == Sizes(
        (100, 20), 50, {UnitKind.ATTENTION: (1, 0), UnitKind.MLP: (1, 0), UnitKind.EXPERT: (8, 8)}
    )
    assert summary(plan.removes()) == "1 block; 1 attention branch in 1 block; 1 MLP branch in 1 block"
    drawn = picture([plan])
    assert [one.state for one in drawn] == ["removed", "kept", "reduced"]
    assert drawn[2].text == "without its attention branch; without its MLP branch"
    assert drawn[2].share == pytest.approx(0.6 * 20 / 60)


def test_unknown_kinds_name_the_known_ones(tmp_path):
    (tmp_path / "plan.json").write_text(plan_of(BRANCH).to_json().replace("test-remove-branch", "paint"))
    with pytest.raises(InputError, match=r"unknown kind of step 'paint'; known: .*drop-blocks.*may not be installed"):
        Plan.read(tmp_path / "plan.json")


def test_two_kinds_of_one_name_are_refused():
    with pytest.raises(InputError, match=r"the kind of step 'drop-blocks' is defined twice, in secateur\.plan\.depth"):
        type("Other", (KeepExperts,), {"__annotations__": {"kind": str}, "kind": "drop-blocks", "__module__": "other"})


@pytest.mark.parametrize(
    ("removal", "text"),
    [
        (Removal(unit=UnitKind.QUERY_HEAD, count=4, total=16), "12 of 16 query heads"),
        (Removal(unit=UnitKind.CHANNEL, count=3000), "without 3,000 channels"),
        (Removal(unit=UnitKind.MLP, count=1, total=1), "without its MLP branch"),
        (Removal(unit=UnitKind.EXPERT, count=8, total=8), "without its experts"),
        (Removal(unit=UnitKind.ATTENTION, count=2), "without 2 attention branches"),
        (Removal(unit=UnitKind.KEY_VALUE_GROUP, count=1, total=2), "1 of 2 key/value groups"),
    ],
)
def test_in_words(removal, text):
    assert str(removal) == text


def test_nothing_goes():
    assert summary(()) == ""
    assert plan_of().removes() == ()


@pytest.mark.parametrize(
    ("method", "amount", "expected"),
    [
        ("last-n", {"blocks": 2}, {UnitKind.BLOCK}),
        ("swm", {"blocks": 1}, {UnitKind.BLOCK}),
        ("slicegpt", {"slicing": 0.25}, {UnitKind.DIRECTION}),
        ("obs-width", {"remove": 0.3}, {UnitKind.CHANNEL}),
    ],
)
def test_steps_of_methods(method, amount, expected, tiny, window_file):
    plan = make_plan(tiny("llama"), method=method, texts=window_file, windows=4, **amount)
    assert expected <= {one.unit for one in plan.removes()}
    after = plan.sizes_after()
    assert all(len(counts) == len(after.blocks) for counts in after.units.values())
    for one in plan.removes():
        left = 0 if one.unit is UnitKind.BLOCK else after.units[one.unit][one.block]
        assert one.unit is UnitKind.BLOCK or one.total - one.count == left


@pytest.mark.parametrize("name", VARIANTS)
def test_units_of_every_family(name, tiny):
    decoder = tiny(name)
    units = model_ref(decoder).units
    if not decoder.anatomy.family.attention_out:
        assert set(units) >= {UnitKind.MLP, UnitKind.CHANNEL, UnitKind.DIRECTION}
        assert UnitKind.QUERY_HEAD not in units
        return
    assert {len(counts) for counts in units.values()} == {decoder.block_count}
    assert all(
        heads % groups == 0 if groups else not heads  # a block may have linear attention instead
        for heads, groups in zip(units[UnitKind.QUERY_HEAD], units[UnitKind.KEY_VALUE_GROUP], strict=True)
    )
    assert (UnitKind.EXPERT in units) == bool(decoder.anatomy.family.router)


def test_a_block_that_was_empty_before_stays():
    dense = [Widths(groups=0, queries=1, channels=0), *(Widths(groups=2, queries=1, channels=8),) * 2]
    sizes = WidthSizes(
        blocks=tuple(BlockSizes(dense=one, group=2, query=2, channel=3, fixed=5) for one in dense), other=7
    )
    widths = (*dense[:2], dense[0])
    assert sizes.kept_blocks(widths) == (0, 1)
    after = sizes.sizes_at(widths)
    assert (after.blocks, after.units[UnitKind.CHANNEL]) == ((5, 5 + 2 * 2 + 2 * 2 + 8 * 3), (0, 8))
