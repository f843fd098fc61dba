"""One contract for every method on every family; a new method or family adds a row and passes the same list.

All folders written here are reopened in one fresh process at the end, so these tests run in order, in one process.
"""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file

from secateur import Plan, make_plan, open_model, prune, save
from secateur.checkpoints.check import record_expected, reopen
from secateur.data.windows import Windows
from secateur.errors import SecateurError
from secateur.methods.method import METHODS
from secateur.models.decoder import Decoder
from secateur.models.families import FAMILIES
from secateur.models.forward import capture, logits, run_block
from secateur.run_options import RunOptions
from tiny_models import LLAMA_SHAPED, MIXED, OTHER_FAMILIES, VARIANTS, VOCABULARY, save_tiny

DROP, SLICE, NARROW, SHARE, LITTLE = {"blocks": 2}, {"slice": 0.25}, {"ratio": 0.2}, {"remove": 0.25}, {"remove": 0.15}
FEWER = {"remove": 0.12}
ENDS = {"protect_first": 2, "protect_last": 1}
"""By itself it protects six blocks, which is all there are here."""
BRIEF = {"batch_size": 3, "evaluations": 1, "learning_rate": 1e-2, "pairs": "recompute"}
"""Training of one step; a skeleton computes its pairs anew too, so that it gives the same."""

CASES = [
    ("shortgpt", DROP, {}),
    ("uidl", DROP, {}),
    ("streamline", DROP, {"network": "none"}),
    ("streamline", DROP, {**BRIEF, "network": "block"}),
    ("streamline", DROP, {**BRIEF, "network": "swiglu"}),
    ("last-n", DROP, {}),
    ("shortened-llama", DROP, {**ENDS, "criterion": "ppl"}),
    ("shortened-llama", DROP, {**ENDS, "criterion": "taylor"}),
    ("shortened-llama", DROP, {**ENDS, "criterion": "taylor", "per_window": True}),
    ("shortened-llama", DROP, {**ENDS, "criterion": "magnitude"}),
    ("sleb", DROP, {}),
    ("swm", {"blocks": 1}, {"rule": "delta-sum", "across_types": True, "protect_first": 2}),
    ("replaceme", DROP, {}),
    ("replaceme", DROP, {"choose": "cosine", "max_window": 2}),
    ("slicegpt", SLICE, {}),
    ("dynamic-slicing", SLICE, {"slice_base": 0.1}),
    ("stock-slicing", SLICE, {}),
    ("stock-slicing", SLICE, {"bases": 2, "sensitivity": False}),
    ("flap", NARROW, {}),
    ("obs-width", NARROW, {"heads": "last", "align": True}),
    ("obs-width", LITTLE, {"allocation": "global", "rounding": 8}),
    ("blockpruner", SHARE, {}),
    ("finercut", SHARE, {}),
    ("2ssp", SHARE, {"rounding": 8}),
    ("branches", LITTLE, {}),
    ("reap", FEWER, {}),
    ("reap", FEWER, {"repair": False}),
    ("ream", FEWER, {}),
    ("ream", FEWER, {"repair": False}),
    ("auto", SHARE, {"trials": 3, "depth": "replaceme,streamline", "width": "none,obs-width"}),
]
ALIKE = {"wanda-sp", "llm-pruner", "minitron-width", "expert-frequency", "expert-activation"}
"""Methods that make the same steps as one above; `test_prune_width.py` and `test_experts.py` run them."""

WITH_EXPERTS = {row.model_type for row in FAMILIES.values() if row.expert_counts}
MIXTURES = {name for name, row in VARIANTS.items() if row.model_type in WITH_EXPERTS}

EXACT = {
    "ernie4_5_moe": ("mlp.gate.weight",),
    "hunyuan_v1_moe": ("mlp.gate.wg.weight",),
    "lfm2_moe": ("feed_forward.expert_bias",),
}
"""Ends of the names of what transformers keeps in float32, besides biases of routers."""

IN_MEMORY_ONLY = {"gpt2-scaled"}
"""Attention scaled by block number: queries are rescaled when blocks go, which a skeleton refuses."""

FEW_FAMILIES = {"llama", "phi", "mixtral", "gemma2", "secateur"}
"""Families that every surgery is tried on; with what runs everywhere they have all traits."""
TWO_FAMILIES = {"llama", "mixtral"}
"""Families for what only chooses by another score, or stops elsewhere, than a case that runs on more."""
CHOOSES_OTHERWISE = ("uidl", "last-n", "shortened-llama", "finercut", "2ssp", "dynamic-slicing")
REFUSING_FAMILIES = {"llama", "gemma2", "secateur"}
"""One that every method can cut, one that `replaceme` refuses and one that `obs-width` refuses."""
EVERYWHERE = ("shortgpt", "swm", "replaceme", "slicegpt", "stock-slicing", "flap", "obs-width")
"""The first case of each of these runs on every other family as well: each does another surgery."""
ALIKE_ANOTHER = {*LLAMA_SHAPED, *MIXED, *OTHER_FAMILIES}
DEPTH_AND_WIDTH = ("shortgpt", "obs-width")
"""The cases for families that share all traits with another, or were detected; `tests/surgery/` folds each of them."""

OF_OTHER_FORM = ("qwen3_next",)
"""One of the families that are sliced though the modelling file cannot hold them; `tests/surgery/hidden/` has more."""
LLAMAS = ("ministral3", "seed_oss", "internlm3", "iquestcoder", "ernie4_5", "hunyuan_v1_dense")
"""Rows that differ from Llama's in nothing that removing blocks depends on."""
MIXTRALS = ("minimax", "hunyuan_v1_moe", "jamba", "ernie4_5_moe")
"""Rows whose experts are as those of another family."""

BRANCH_METHODS = ("blockpruner", "finercut", "2ssp", "branches")
WIDTH_METHODS = ("flap", "obs-width", *BRANCH_METHODS)

REFUSED = {
    ("swm", "qwen3_moe-step"): "neighbouring blocks differ in shape everywhere",
    **{
        ("replaceme", name): "has a norm between the MLP's output and the residual stream"
        for name in ("gemma2", "gemma3_text", "olmo2", "opt-post-norm")
    },
    **{
        (method, name): "(hidden size of this model cannot be sliced|no module without attention can be inserted): "
        for method in ("slicegpt", "dynamic-slicing", "stock-slicing", "streamline swiglu")
        for name in ("gemma2", "gemma3_text", "olmo2", "opt-post-norm", "secateur")
    },
    **{
        (method, name): "need the modelling file, which cannot hold this model"
        for method in ("flap", "obs-width global", *BRANCH_METHODS)
        for name in ("gemma2", "gemma3_text", "olmo2", "opt-post-norm")
    },
    **{(method, "secateur"): "experts of a model with its modelling file" for method in WIDTH_METHODS},
    **{
        (method, name): "has no experts"
        for method in ("reap", "ream")
        for name in set(VARIANTS) - MIXTURES - {"secateur"}
    },
    **{(method, "secateur"): "remove them from the dense model first" for method in ("reap", "ream")},
}
"""Methods that cannot cut a family, and why."""

BLOCKS = 6
WINDOWS = Windows.of(torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1)))


@dataclasses.dataclass
class Opened:
    memory: Decoder
    skeleton: Decoder
    answers: torch.Tensor
    written: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """Answers of the cut models written so far, by fingerprint: methods that agree give one folder."""


@pytest.fixture(scope="module")
def folders_to_reopen(request):
    """Collect the folders that tests write; when the last has run, all reopen in one fresh process."""
    jobs: list[dict] = []
    yield jobs
    cases = [item for item in request.session.items if item.function is test_contract]
    if len(cases) == len(CASES) * len(VARIANTS):
        assert len(jobs) > 2 * len(VARIANTS), "whole runs write folders for every family"
    results = reopen(jobs) if jobs else []
    assert len(results) == len(jobs)
    failed = [result for result in results if not result["passed"] or result["stored_dtype"] != "bfloat16"]
    assert not failed, failed[:3]
    assert max((result["logit_difference"] for result in results), default=0.0) < 1e-5


@pytest.fixture(scope="module", params=list(VARIANTS))
def opened(request, tmp_path_factory):
    place = tmp_path_factory.mktemp(request.param)
    folder = save_tiny(request.param, place, blocks=BLOCKS, dtype=torch.bfloat16, tokenizer=True)
    memory = open_model(folder)
    return request.param, Opened(memory, open_model(folder, skeleton=True), answers(memory))


@torch.no_grad()
def answers(decoder: Decoder) -> torch.Tensor:
    hidden, calls = capture(decoder, WINDOWS.tokens)
    for index, call in enumerate(calls):
        with decoder.block(index) as block:
            hidden = run_block(block, call, hidden)
    with decoder.outer():
        return logits(decoder, hidden, WINDOWS.tokens)


def plan_for(decoder: Decoder, method: str, amount: dict, settings: dict) -> Plan:
    own = amount if "ratio" in amount else {}  # a method's own amount is one of its settings
    given = {} if own else amount
    return make_plan(
        decoder, method=method, **given, texts=WINDOWS, settings=settings | own, options=RunOptions(seed=3)
    )


def cut(decoder: Decoder, plan: Plan) -> Decoder:
    return prune(decoder, plan, texts=WINDOWS)


def test_every_method_has_a_case():
    assert {name for name, *_ in CASES} | ALIKE == set(METHODS)


@pytest.mark.parametrize(("method", "amount", "settings"), CASES, ids=lambda value: str(value))
def test_contract(opened, method, amount, settings, folders_to_reopen, tmp_path_factory):
    name, models = opened
    if not runs_on(name, method, settings):
        pytest.skip("a few families stand for all")
    if method == "auto" and name not in REFUSING_FAMILIES:
        pytest.skip("it applies other methods, which have their own cases")
    before = models.answers
    if "remove" not in amount:  # a share of nothing is an error
        nothing = plan_for(models.memory, method, dict.fromkeys(amount, 0), settings)
        assert torch.equal(answers(cut(models.memory, nothing)), before)
        assert nothing.parameters_after == nothing.parameters_before == models.memory.parameter_count

    refused = REFUSED.get((kind_of(method, settings), name)) or REFUSED.get((method, name))
    if refused:
        for decoder in (models.memory, models.skeleton):
            with pytest.raises(SecateurError, match=refused):
                plan_for(decoder, method, amount, settings)
        return

    plan = plan_for(models.memory, method, amount, settings)
    assert plan == plan_for(models.memory, method, amount, settings)
    assert Plan.model_validate_json(plan.to_json()) == plan

    pruned = cut(models.memory, plan)
    assert pruned.parameter_count == plan.parameters_after != plan.parameters_before
    assert pruned.block_parameter_counts() == plan.sizes_after().blocks
    assert pruned.block_count == len(plan.kept_blocks())
    assert "remove" in amount or pruned.block_count == BLOCKS - amount.get("blocks", 0)
    after = answers(pruned)
    assert not torch.allclose(after, before, atol=1e-3)
    assert torch.equal(answers(models.memory), before), "the model given must stay as it is"

    in_memory_only = pruned.block_count < BLOCKS and name in IN_MEMORY_ONLY
    if not in_memory_only:
        assert plan_for(models.skeleton, method, amount, settings).steps == plan.steps
    if pruned.fingerprint in models.written:
        assert torch.equal(models.written[pruned.fingerprint], after)
        return
    models.written[pruned.fingerprint] = after
    folder = tmp_path_factory.mktemp("cut") / "cut"
    saved = save(pruned, folder, check=False)
    folders_to_reopen.append(record_expected(pruned, folder.parent / "expected.npz").job(folder))
    if not in_memory_only:
        light = cut(models.skeleton, plan)
        assert torch.equal(answers(light), after)
        save(light, folder.parent / "light", check=False, shard_bytes=20_000)
        assert_same_weights(folder, folder.parent / "light", saved["parameters_after"], exact=EXACT.get(name, ()))


def runs_on(family, method, settings):
    """Return whether this case runs on a family."""
    kind = kind_of(method, settings)
    first = settings == next(given for known, _, given in CASES if kind_of(known, given) == kind)
    if family in FEW_FAMILIES:
        return family in TWO_FAMILIES or (first and method not in CHOOSES_OTHERWISE)
    return first and kind in (alike(family) if family in ALIKE_ANOTHER else EVERYWHERE)


def alike(family):
    """Return the cases of a family that shares all traits with another, or was detected."""
    if family in LLAMAS:
        return ("obs-width",)
    reap = family in MIXED and family not in MIXTRALS
    return (*DEPTH_AND_WIDTH, *["reap"] * reap, *["stock-slicing"] * (family in OF_OTHER_FORM))


def kind_of(method, settings):
    """Return the method, with what of its settings makes it do another surgery."""
    return f"{method} {settings.get('network') or settings.get('allocation', '')}".strip()


def assert_same_weights(left, right, parameters, exact):
    index = json.loads((right / "model.safetensors.index.json").read_text())
    weights = load_file(left / "model.safetensors")
    assert set(index["weight_map"]) == set(weights)
    assert index["metadata"]["total_parameters"] == parameters
    for file in set(index["weight_map"].values()):
        for key, tensor in load_file(right / file).items():
            assert index["weight_map"][key] == file
            assert torch.equal(tensor, weights[key]), key
            kept_exact = key.endswith((*exact, "e_score_correction_bias"))
            assert tensor.dtype == weights[key].dtype == (torch.float32 if kept_exact else torch.bfloat16), key


def test_families_outside_the_table_are_part_of_the_contract():
    assert OTHER_FAMILIES
    assert set(OTHER_FAMILIES) <= set(VARIANTS)
