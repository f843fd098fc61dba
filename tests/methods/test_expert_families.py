"""Fewer experts in families of every layout: groups, correction biases, shared experts, with a row and without."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

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
    for name, settings in (("reap", {}), ("reap", {"repair": False}), ("ream", {})):
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
        prune(model, uneven, texts=WINDOWS)


def test_a_row_that_does_not_name_the_counts_is_refused(opened):
    model = opened[0]
    family = replace(model.anatomy.family, expert_counts=())
    unknown = replace(model, anatomy=replace(model.anatomy, family=family))
    with pytest.raises(ModelError, match="not known where its configuration counts them"):
        mixture_of(unknown)


BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": POSITIONS,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
}
LATENT = {
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
}
DEEPSEEK = {
    "num_key_value_heads": 4,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    **LATENT,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 8}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "linear_attention", "full_attention", "full_attention"],
}
OTHERS = {
    "afmoe": {"num_experts": 8, "num_dense_layers": 1, "num_shared_experts": 1, "sliding_window": 8},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, "n_group": 2, "topk_group": 1},
    "dots1": {"n_routed_experts": 8, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2, "topk_group": 1},
    "ernie4_5_moe": {"moe_num_experts": 8, "moe_k": 2, "moe_layer_start_index": 1, "moe_num_shared_experts": 1},
    "gpt_oss": {"num_local_experts": 8, "sliding_window": 8},
    "granitemoehybrid": {
        "num_local_experts": 8,
        "shared_intermediate_size": 16,
        "residual_multiplier": 0.3,
        "layer_types": ["mamba", "attention"] * 2,
        **MAMBA,
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2, "num_shared_expert": 1},
    "lfm2_moe": {"num_experts": 8, "num_dense_layers": 1, "layer_types": ["conv", "conv", "full_attention", "conv"]},
    "llama4_text": {"num_local_experts": 8, "num_experts_per_tok": 1, "intermediate_size_mlp": 48},
    "minimax": {"num_local_experts": 8, "mlp_beta_factor": 0.5, "layer_types": LINEAR["layer_types"]},
    "olmoe": {"num_experts": 8},
    "qwen3_next": {"num_experts": 8, "shared_expert_intermediate_size": 16, **LINEAR},
}
"""Mixtures of every layout there is: groups of experts, biases of routers inside and beside them, stacked experts that
are transposed, have biases or get scaled inputs, routers that return logits alone, factors behind the experts."""


@pytest.fixture(scope="module")
def folders_to_reopen():
    """Collect the folders that tests write; when the last has run, all reopen in one fresh process."""
    jobs: list[dict] = []
    yield jobs
    results = reopen(jobs)
    assert [result for result in results if not result["passed"] or result["stored_dtype"] != "bfloat16"] == []


@pytest.mark.parametrize("model_type", OTHERS)
def test_other_families(model_type, tmp_path_factory, folders_to_reopen):
    """Whether it has a row or is detected: what was cut opens, the skeleton's is the same, and experts go whole."""
    settings = {**BASE, **OTHERS[model_type]}
    module = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **settings), dtype=torch.bfloat16)
    tiny_models.draw_parameters(module, 0)
    for name, buffer in module.named_buffers():
        if "bias" in name:
            buffer.copy_(0.1 * torch.randn(buffer.shape, generator=torch.Generator().manual_seed(len(name))))
    place = tmp_path_factory.mktemp(model_type)
    module.eval().save_pretrained(place / "dense")
    build_tokenizer().save_pretrained(place / "dense")
    memory, skeleton = open_model(place / "dense"), open_model(place / "dense", skeleton=True)
    mixture = mixture_of(memory)
    assert (mixture.count, mixture.chosen) == (8, settings.get("moe_k") or settings["num_experts_per_tok"])
    for name, given in (("reap", {}), ("ream", {"repair": False})):
        plan = make_plan(memory, method=name, texts=WINDOWS, settings={"experts": 6} | given)
        cuts = [prune(one, plan, texts=WINDOWS) for one in (memory, skeleton)]
        assert cuts[0].fingerprint == cuts[1].fingerprint
        assert cuts[0].parameter_count == plan.parameters_after
        assert mixture_of(cuts[0]).count == 6
        if name == "reap":
            require_whole_experts(memory, cuts[0], plan.steps[0].kept)
        for number, one in enumerate(cuts):
            folder = place / f"{name}-{number}"
            save(one, folder, check=False)
            folders_to_reopen.append(record_expected(one, folder.with_suffix(".npz")).job(folder))


def require_whole_experts(dense, cut, kept):
    """Everything that lost an expert lost the same ones; besides, only what experts write was refitted."""
    for index, stay in enumerate(kept):
        old, new = (
            {**dict(one.block_list[index].named_parameters()), **dict(one.block_list[index].named_buffers())}
            for one in (dense, cut)
        )
        shorter = {name for name in old if old[name].shape != new[name].shape}
        assert bool(shorter) == bool(stay)
        for name, tensor in old.items():
            if name in shorter:
                (axis,) = (axis for axis, size in enumerate(tensor.shape) if new[name].shape[axis] != size)
                tensor = tensor.index_select(axis, torch.tensor(stay))
            same = torch.equal(tensor.bfloat16(), new[name].bfloat16())  # HunYuan makes a router in float32
            assert same or name.endswith("experts.down_proj"), name
