"""A plan is data: written, read, edited, applied; what contradicts itself is refused."""

import json

import pytest
import torch
from pydantic import ValidationError

from oracles import draw_tokens, draw_windows, forward, no_real_parameters, walk
from secateur import Plan, make_plan, prune
from secateur.errors import InputError, ModelError
from secateur.methods.planning import model_ref
from secateur.models.opening import open_model
from secateur.plan.plan import ModelRef
from secateur.plan.steps import DropBlocks
from secateur.run_options import RunOptions
from tiny_models import build

REF = ModelRef(
    source="somewhere", fingerprint="f" * 64, family="llama", block_parameters=(10, 20, 30, 40), other_parameters=100
)
MODES = pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])


def plan_of(*steps, model=REF):
    return Plan(version="0", model=model, steps=tuple(DropBlocks(method="by hand", blocks=step) for step in steps))


def plan_for(decoder, *steps):
    return plan_of(*steps, model=model_ref(decoder))


@pytest.fixture
def written(tiny, tmp_path):
    """A plan file, and a function that edits its JSON."""
    plan = make_plan(tiny("llama"), method="shortgpt", blocks=2, texts=draw_windows(), options=RunOptions(seed=3))
    path = tmp_path / "plan.json"
    plan.write(path)

    def edit(change):
        data = json.loads(path.read_text())
        change(data)
        path.write_text(json.dumps(data))
        return path

    return plan, path, edit


# Sizes


def test_sizes():
    plan = plan_of((1, 2))
    assert plan.kept_blocks() == (0, 3)
    assert (plan.parameters_before, plan.parameters_after) == (200, 150)
    assert plan.removed_fraction == pytest.approx(0.25)


@pytest.mark.parametrize("steps", [(), ((),), ((), ())])
def test_plans_that_change_nothing(steps):
    plan = plan_of(*steps)
    assert plan.kept_blocks() == (0, 1, 2, 3)
    assert plan.parameters_after == plan.parameters_before == 200
    assert plan.removed_fraction == 0


def test_steps_count_in_the_model_the_step_before_left():
    plan = plan_of((0,), (0,), (1,))
    assert plan.kept_blocks() == (2,)
    assert plan.parameters_after == 130


def test_the_order_of_blocks_does_not_matter():
    assert plan_of((2, 0)).kept_blocks() == plan_of((0, 2)).kept_blocks() == (1, 3)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3_moe-mixed", "opt"])
def test_a_model_as_plans_name_it(name, tiny):
    decoder = tiny(name)
    ref = model_ref(decoder)
    assert sum(ref.block_parameters) + ref.other_parameters == decoder.module.num_parameters()
    assert (ref.source, ref.fingerprint) == (decoder.source, decoder.fingerprint)
    assert ref == model_ref(tiny(name, skeleton=True))


# The file


def test_round_trip(written):
    plan, path, _ = written
    assert Plan.read(path) == Plan.read(str(path)) == plan
    data = json.loads(path.read_text())
    assert data["format"] == 2
    assert data["steps"][0]["blocks"] == list(plan.steps[0].blocks)
    assert data["parameters_after"] == plan.parameters_after
    assert data["removed_fraction"] == plan.removed_fraction
    assert data["requested"] == {"blocks": 2}
    assert data["texts"]["windows"] == 4
    path.write_text(path.read_text(encoding="utf-8"), encoding="utf-8-sig")
    assert Plan.read(path) == plan, "as some editors save it"


def test_no_tensors_in_a_plan(written):
    plan, path, _ = written
    assert path.stat().st_size < 3000
    assert Plan.model_validate(json.loads(plan.to_json())) == plan


def test_edited_blocks_give_other_sizes(written):
    plan, _, edit = written
    again = Plan.read(edit(lambda data: data["steps"][0].update(blocks=[6])))
    assert again.steps[0].blocks == (6,)
    block = plan.model.block_parameters[0]
    assert again.parameters_after == plan.parameters_after + block
    assert again.removed_fraction == pytest.approx(block / plan.parameters_before)


def test_edited_sizes_are_not_believed(written):
    plan, _, edit = written
    again = Plan.read(edit(lambda data: data.update(parameters_after=1, parameters_before=2, removed_fraction=0.9)))
    assert again == plan
    assert again.parameters_after == plan.parameters_after


@pytest.mark.parametrize(
    ("blocks", "said"),
    [
        ([8], "drops block 8, but this model has blocks 0 to 7"),
        ([-1], "drops block -1"),
        ([3, 3], "names a block twice"),
        (list(range(8)), "drops every block"),
        (["x"], r"steps\.0.*blocks"),
        ([1.5], r"steps\.0.*blocks"),
        (None, r"steps\.0.*blocks"),
    ],
)
def test_edits_that_cannot_be_applied(written, blocks, said):
    *_, edit = written
    with pytest.raises(InputError, match=said):
        Plan.read(edit(lambda data: data["steps"][0].update(blocks=blocks)))


def test_a_later_step_may_ask_too_much():
    plan_of((0,), (2,))
    with pytest.raises(InputError, match="drops block 3, but this model has blocks 0 to 2"):
        plan_of((0,), (3,))
    with pytest.raises(InputError, match="drops every block"):
        plan_of((0, 1), (0, 1))


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.update(colour="red"),
        lambda data: data["steps"][0].update(colour="red"),
        lambda data: data["model"].update(colour="red"),
        lambda data: data.update(format=3),
        lambda data: data.pop("model"),
        lambda data: data["steps"][0].update(kind="paint"),
        lambda data: data.update(steps="none"),
    ],
    ids=["key", "key of a step", "key of the model", "format", "no model", "kind", "steps"],
)
def test_edits_that_are_no_plan(written, change):
    *_, edit = written
    with pytest.raises(InputError, match=r"plan\.json: not a valid plan"):
        Plan.read(edit(change))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"text"', b"null", b"\xff\xfe\x00"])
def test_files_that_are_no_plan(content, tmp_path):
    path = tmp_path / "plan.json"
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"plan\.json"):
        Plan.read(path)


def test_files_that_are_not_there(tmp_path):
    for path in (tmp_path / "nothing.json", tmp_path):
        with pytest.raises(InputError, match="cannot be read"):
            Plan.read(path)


def test_plans_cannot_be_changed():
    with pytest.raises(ValidationError):
        plan_of((1,)).seed = 4


# Applying


@MODES
@pytest.mark.parametrize("name", ["llama", "gemma3_text", "qwen3_moe-mixed"])
def test_applied(name, skeleton, tiny):
    decoder = tiny(name, skeleton=skeleton)
    plan = plan_for(decoder, (2, 5))
    pruned = prune(decoder, plan)
    tokens = draw_tokens()
    assert torch.equal(walk(pruned, tokens), walk(decoder, tokens, without=(2, 5)))
    assert pruned.parameter_count == plan.parameters_after
    assert pruned.is_skeleton == skeleton
    assert not skeleton or no_real_parameters(pruned.module)
    assert decoder.block_count == 8
    assert decoder.history == ()
    (entry,) = pruned.history
    assert Plan.model_validate(entry["plan"]) == plan
    assert entry["applied"]


@MODES
def test_several_steps(skeleton, tiny):
    decoder = tiny("llama", skeleton=skeleton)
    pruned = prune(decoder, plan_for(decoder, (0, 3), (1, 5)))
    assert pruned.block_count == 4
    tokens = draw_tokens()
    assert torch.equal(walk(pruned, tokens), walk(decoder, tokens, without=(0, 2, 3, 7)))


@pytest.mark.parametrize("steps", [(), ((),)])
def test_nothing_applied(steps, tiny):
    decoder = tiny("llama")
    pruned = prune(decoder, plan_for(decoder, *steps))
    tokens = draw_tokens()
    assert torch.equal(forward(pruned.module, tokens), forward(decoder.module, tokens))
    assert pruned.fingerprint == decoder.fingerprint
    assert len(pruned.history) == 1


def test_applied_from_a_file(written, tiny):
    plan, path, edit = written
    assert prune(tiny("llama"), path).block_count == 6
    assert prune(tiny("llama"), str(path)).fingerprint == prune(tiny("llama"), plan).fingerprint
    edit(lambda data: data["steps"][0].update(blocks=[6]))
    edited = prune(tiny("llama"), path)
    assert edited.block_count == 7
    tokens = draw_tokens()
    assert torch.equal(forward(edited.module, tokens), walk(tiny("llama"), tokens, without=(6,)))


def test_applied_twice(tiny):
    decoder = tiny("llama")
    once = prune(decoder, plan_for(decoder, (2,)))
    twice = prune(once, plan_for(once, (2,)))
    tokens = draw_tokens()
    assert torch.equal(walk(twice, tokens), walk(decoder, tokens, without=(2, 3)))
    assert [entry["plan"]["steps"][0]["blocks"] for entry in twice.history] == [[2], [2]]
    assert len({one.fingerprint for one in (decoder, once, twice)}) == 3
    with pytest.raises(InputError, match="another model"):
        prune(once, plan_for(decoder, (2,)))


def test_another_model_is_refused(written, tiny):
    plan, *_ = written
    for other in (tiny("qwen2"), open_model(build("llama", seed=1)), tiny("llama", blocks=4)):
        with pytest.raises(InputError, match=r"for another model.*fingerprint"):
            prune(other, plan)


def test_the_same_cut_has_the_same_fingerprint(tiny):
    memory, skeleton = tiny("llama"), tiny("llama", skeleton=True)
    one = prune(memory, plan_for(memory, (2, 5)))
    other = prune(skeleton, plan_for(skeleton, (5, 2)))
    third = prune(memory, plan_for(memory, (2, 6)))
    assert one.fingerprint == other.fingerprint != third.fingerprint


def test_sizes_edited_by_hand_are_noticed(written, tiny):
    *_, edit = written
    path = edit(lambda data: data["model"].update(other_parameters=5))
    with pytest.raises((ModelError, InputError), match="parameters"):
        prune(tiny("llama"), path)


def test_a_plan_for_a_model_of_another_depth_is_noticed(written, tiny):
    *_, edit = written
    path = edit(lambda data: data["model"].update(block_parameters=data["model"]["block_parameters"] * 2))
    with pytest.raises((ModelError, InputError)):
        prune(tiny("llama"), path)
