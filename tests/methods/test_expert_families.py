"""Fewer experts where the router has groups and a correction bias, and every token passes a shared expert."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig

import tiny_models
from secateur import make_plan, open_model, prune, save
from secateur.checkpoints.check import record_expected, reopen
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError
from secateur.models.experts import mixture_of
from tiny_models import BOS, EOS, HIDDEN, INTERMEDIATE, PAD, POSITIONS, VOCABULARY, TinyModel, build, build_tokenizer

WINDOWS = Windows.of(torch.randint(0, VOCABULARY, (4, 16), generator=torch.Generator().manual_seed(1)))
BIAS = "mlp.gate.e_score_correction_bias"


def config(blocks):
    return AutoConfig.for_model(
        "glm4_moe",
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=INTERMEDIATE,
        moe_intermediate_size=24,
        num_hidden_layers=blocks,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        max_position_embeddings=POSITIONS,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )


@pytest.fixture(scope="module")
def opened(tmp_path_factory):
    """Return a tiny model in memory and as a skeleton."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(tiny_models.VARIANTS, "glm4_moe", TinyModel("glm4_moe", "glm4_moe", config))
        module = build("glm4_moe", blocks=3, dtype=torch.bfloat16)
        for number, layer in enumerate(module.model.layers):
            if number:
                bias = layer.mlp.gate.e_score_correction_bias
                bias.copy_(0.1 * torch.randn(bias.shape, generator=torch.Generator().manual_seed(number)))
        folder = tmp_path_factory.mktemp("glm4_moe")
        module.save_pretrained(folder)
        build_tokenizer().save_pretrained(folder)
        yield open_model(folder), open_model(folder, skeleton=True)


def test_groups_biases_and_shared_experts_stay_what_they_are(opened, tmp_path):
    jobs = []
    for name, settings in (("reap", {}), ("reap", {"repair": True}), ("ream", {})):
        pruned = []
        for model in opened:
            plan = make_plan(model, method=name, texts=WINDOWS, settings=settings | {"experts": 4})
            pruned.append(prune(model, plan, texts=WINDOWS))
        memory, skeleton = pruned
        assert memory.fingerprint == skeleton.fingerprint
        assert memory.config.n_routed_experts == 4
        assert (memory.config.n_group, memory.config.topk_group) == (2, 1)
        for index in (1, 2):
            old, new = (one.block_list[index].get_buffer(BIAS) for one in (opened[0], memory))
            kept = [int((old == value).nonzero()) for value in new]
            assert sum(expert < 4 for expert in kept) == 2, "two of each group"
            assert torch.equal(
                memory.block_list[index].mlp.gate.weight, opened[0].block_list[index].mlp.gate.weight[kept]
            )
            assert new.dtype == torch.float32
            for part in memory.block_list[index].mlp.shared_experts.named_parameters():
                assert torch.equal(part[1], opened[0].block_list[index].mlp.shared_experts.get_parameter(part[0]))
        for number, one in enumerate(pruned):
            folder = tmp_path / f"{len(jobs)}-{number}"
            save(one, folder, check=False)
            jobs.append(record_expected(one, folder.with_suffix(".npz")).job(folder))
    results = reopen(jobs)
    assert [result["passed"] for result in results] == [True] * 6
    assert {result["stored_dtype"] for result in results} == {"bfloat16"}


def test_what_a_grouped_router_allows(opened):
    model = opened[0]
    mixture = mixture_of(model)
    assert (mixture.count, mixture.chosen, mixture.groups, mixture.chosen_groups) == (8, 2, 2, 1)
    assert mixture.sizes[0] is None
    for experts, words in ((7, "2 groups must keep as many"), (2, "at least 4 must stay")):
        with pytest.raises(InputError, match=words):
            make_plan(model, method="reap", texts=WINDOWS, settings={"experts": experts})
    plan = make_plan(model, method="reap", texts=WINDOWS, settings={"experts": 6})
    kept = [list(one) for one in plan.steps[0].kept]
    kept[1] = [0, 1, 2, 3, 4, 5]
    uneven = plan.model_copy(update={"steps": (plan.steps[0].model_copy(update={"kept": tuple(map(tuple, kept))}),)})
    with pytest.raises(InputError, match="more experts of one group than of another in block 1"):
        prune(model, uneven)


def test_a_row_that_does_not_name_the_counts_is_refused(opened):
    model = opened[0]
    family = replace(model.anatomy.family, expert_counts=())
    unknown = replace(model, anatomy=replace(model.anatomy, family=family))
    with pytest.raises(ModelError, match="does not say where its configuration counts them"):
        mixture_of(unknown)
