"""Every family row against every tiny variant: its names exist, nothing is left over, the walk is the model."""

import pytest
import torch
from torch import nn

from oracles import draw_tokens, forward, no_real_parameters, pad, walk, walks
from secateur.errors import ModelError
from secateur.models.anatomy import count_parameters, find, present
from secateur.models.families import FAMILIES
from secateur.models.opening import open_model
from tiny_models import OTHER_FAMILIES, VARIANTS, build, save_tiny

SUPPORTED = [name for name in VARIANTS if name not in OTHER_FAMILIES]
SHARED = ("shared_in", "shared_out")
MATRIX_PARTS = ("attention_in", "attention_out", "mlp_in", "mlp_out", "router", *SHARED)
BLOCK_PARTS = (*MATRIX_PARTS, "norms", "attention_norms")
_WITH_GATES = ("linear_attn", "mlp.shared_expert.gate_", "mlp.shared_expert.up_", "mlp.shared_expert_gate")
_STATE_SPACE = (
    "mixer.in_proj",
    "mixer.conv1d",
    "mixer.out_proj",
    "mixer.norm",
    "mixer.A_log",
    "mixer.D",
    "mixer.dt_bias",
)
_LATENT = ("self_attn.q_a_", "self_attn.kv_a_")
UNKNOWN = {
    "deepseek_v2": _LATENT,
    "deepseek_v3": _LATENT,
    "qwen3_5_text": ("linear_attn",),
    "falcon_h1": ("mamba.",),
    "bamba": ("mamba.",),
    "jamba": ("mamba.",),
    "lfm2": ("conv.",),
    "lfm2_moe": ("conv.",),
    "nemotron_h": (*_STATE_SPACE, "mixer.shared_experts.up_"),
    "minimax": ("self_attn.",),
    "qwen3_next": _WITH_GATES,
    "qwen3_5_moe_text": _WITH_GATES,
}
"""How parameters begin that a row does not name: latent or linear attention, state spaces, convolutions, an expert of
its own width."""
OUTER_PARTS = ("embeddings", "final")

# Parts of attention that a configuration has to ask for; no variant of tiny_models does.
ASKING = {
    "phi": {"qk_layernorm": True},
    "stablelm": {"qk_layernorm": True},
    "cohere": {"use_qk_norm": True},
    "deepseek_v2": {"q_lora_rank": None},
    "deepseek_v3": {"q_lora_rank": None},
}


@pytest.fixture(scope="module")
def with_query_norms(tmp_path_factory):
    """Return the folder of a tiny model whose attention has the norms that are off by default."""

    def folder(name):
        row = VARIANTS[name]

        def config(blocks):
            asked = row.config(blocks)
            for key, value in ASKING[name].items():
                assert getattr(asked, key) != value
                setattr(asked, key, value)
            return asked

        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(VARIANTS, name, type(row)(row.name, row.model_type, config))
            return save_tiny(name, tmp_path_factory.mktemp(name), blocks=2)

    return folder


def names_found(decoder):
    """Names of the row that exist in this model, as (part, name)."""
    family = decoder.anatomy.family
    found = {(part, n) for part in OUTER_PARTS for n, _ in present(decoder.module, getattr(family, part))}
    for block in decoder.block_list:
        found |= {(part, n) for part in BLOCK_PARTS for n, _ in present(block, getattr(family, part))}
    return found


def parameters_under(module, names):
    """Names of the parameters that stand at or under these paths."""
    found = set()
    for name, part in present(module, names):
        if isinstance(part, nn.Parameter):
            found |= {name, f"{name}_bias"} if find(module, f"{name}_bias") is not None else {name}
        elif isinstance(part, nn.Module):  # else a buffer
            found |= {f"{name}.{leaf}" for leaf, _ in part.named_parameters()}
    return found


def test_every_row_has_a_tiny_variant_and_every_variant_a_row():
    assert {VARIANTS[name].model_type for name in SUPPORTED} == set(FAMILIES)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_every_name_of_a_row_exists_in_one_of_its_variants(model_type, tiny, with_query_norms):
    row = FAMILIES[model_type]
    variants = [name for name in SUPPORTED if VARIANTS[name].model_type == model_type]
    decoders = [tiny(name, skeleton=True) for name in variants]
    decoders += [open_model(with_query_norms(model_type))] if model_type in ASKING else []
    found = set().union(*map(names_found, decoders))
    assert {(part, name) for part in (*BLOCK_PARTS, *OUTER_PARTS) for name in getattr(row, part)} == found


@pytest.mark.parametrize("model_type", FAMILIES)
def test_configuration_entries_of_a_row_exist(model_type):
    row = FAMILIES[model_type]
    variant = next(name for name in SUPPORTED if VARIANTS[name].model_type == model_type)
    config = VARIANTS[variant].config(8)
    for name in row.per_layer_lists:
        assert len(getattr(config, name)) == 8
    named = [*row.leading_counts, row.dense_blocks, row.parallel if isinstance(row.parallel, str) else None]
    for name in named:
        assert name is None or hasattr(config, name)


@pytest.mark.parametrize("skeleton", [False, True], ids=["memory", "skeleton"])
@pytest.mark.parametrize("name", SUPPORTED)
def test_opens_with_its_own_row(name, skeleton, tiny):
    decoder = tiny(name, skeleton=skeleton)
    module = build(name)
    assert decoder.anatomy.family is FAMILIES[VARIANTS[name].model_type]
    assert decoder.is_skeleton is skeleton
    assert decoder.block_count == len(decoder.block_list) == 8
    assert decoder.hidden_size == module.config.hidden_size
    assert decoder.anatomy.tied == (module.get_input_embeddings().weight is module.get_output_embeddings().weight)
    assert decoder.parameter_count == count_parameters(module) == module.num_parameters()
    blocks = find(module, decoder.anatomy.family.blocks)
    assert decoder.block_parameter_counts() == tuple(sum(p.numel() for p in b.parameters()) for b in blocks)


@pytest.mark.parametrize("name", SUPPORTED)
def test_parts_cover_every_parameter_of_a_block_once(name, tiny):
    decoder = tiny(name, skeleton=True)
    family = decoder.anatomy.family
    for block in decoder.block_list:
        by_part = {part: parameters_under(block, getattr(family, part)) for part in BLOCK_PARTS}
        known = {n: p for n, p in block.named_parameters() if not n.startswith(UNKNOWN.get(name, ()))}
        matrices = {n for n, p in known.items() if p.dim() >= 2}
        assert matrices <= set().union(*(by_part[part] for part in MATRIX_PARTS))
        assert set().union(*by_part.values()) == set(known)
        assert sum(map(len, by_part.values())) == len(known)
        for part in ("attention_in", "attention_out", "mlp_in", "mlp_out"):
            assert by_part[part] or not getattr(family, part) or family.light_blocks, f"no {part}"


@pytest.mark.parametrize("name", SUPPORTED)
def test_parts_cover_every_parameter_outside_the_blocks(name, tiny):
    decoder = tiny(name, skeleton=True)
    family = decoder.anatomy.family
    outside = {n for n, _ in decoder.module.named_parameters() if not n.startswith(f"{family.blocks}.")}
    covered = parameters_under(decoder.module, (*family.embeddings, *family.final, family.head))
    assert outside <= covered


@pytest.mark.parametrize("model_type", ASKING)
def test_query_norms_leave_no_parameter_of_a_block_uncovered(model_type, with_query_norms):
    decoder = open_model(with_query_norms(model_type))
    for block in decoder.block_list:
        parts = [getattr(decoder.anatomy.family, part) for part in BLOCK_PARTS]
        covered = set().union(*(parameters_under(block, names) for names in parts))
        known = UNKNOWN.get(model_type, ())
        assert covered == {n for n, _ in block.named_parameters() if not n.startswith(known)}
    tokens = draw_tokens()
    assert torch.equal(walk(decoder, tokens), forward(decoder.module, tokens))


@pytest.mark.parametrize("name", SUPPORTED)
def test_norms_compute_what_the_row_says(name, tiny):
    decoder = tiny(name)
    row = decoder.anatomy.family
    _, norm = next(present(decoder.block_list[0], row.norms))
    x = torch.randn(3, decoder.hidden_size, generator=torch.Generator().manual_seed(0))
    subtracts_the_mean = torch.allclose(norm(x + 5), norm(x), atol=1e-4)
    assert subtracts_the_mean == (row.norm == "layernorm")
    if row.norm != "layernorm":
        plain = x * (x.square().mean(dim=-1, keepdim=True) + 1e-6).rsqrt()
        weight = getattr(norm, "weight", torch.ones(()))
        scale = weight + 1 if row.norm == "rms-plus-one" else weight
        torch.testing.assert_close(norm(x), plain * scale, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", [name for name in SUPPORTED if name not in UNKNOWN])
def test_branches_are_parallel_where_the_row_says_so(name, tiny):
    """In a parallel block what the MLP reads does not change with what attention writes."""
    decoder = tiny(name)
    row = decoder.anatomy.family
    block = decoder.block_list[0]
    writer = find(block, row.attention_out[0])
    reader = next(m for _, m in present(block, (*row.router, *row.mlp_in)) if isinstance(m, nn.Module))
    read, tokens = [], draw_tokens(windows=1)
    noticing = reader.register_forward_pre_hook(lambda _, args: read.append(args[0]))
    forward(decoder.module, tokens)
    silencing = writer.register_forward_hook(lambda _m, _a, output: torch.zeros_like(output))
    forward(decoder.module, tokens)
    noticing.remove()
    silencing.remove()
    assert torch.equal(*read) == decoder.anatomy.parallel


@pytest.mark.parametrize("name", SUPPORTED)
def test_walk_is_bit_equal_to_the_plain_forward(name, tiny):
    decoder, skeleton = tiny(name), tiny(name, skeleton=True)
    batches = [pad(draw_tokens(), side) for side in (None, "left", "right")]
    in_memory = walks(decoder, batches)
    assert no_real_parameters(skeleton.module)
    from_skeleton = walks(skeleton, batches)
    assert no_real_parameters(skeleton.module)
    for (tokens, mask), *found in zip(batches, in_memory, from_skeleton, strict=True):
        real = torch.ones_like(tokens, dtype=torch.bool) if mask is None else mask
        expected = forward(decoder.module, tokens, mask)[real]
        assert torch.isfinite(expected).all()
        assert torch.equal(found[0][real], expected)
        assert torch.equal(found[1][real], expected)


def test_a_skeleton_holds_one_block_at_a_time(tiny_folder):
    decoder = open_model(tiny_folder("llama"), skeleton=True)

    def real():
        return {n.split(".")[2] if "layers" in n else n for n, p in decoder.module.named_parameters() if not p.is_meta}

    with decoder.block(3) as block:
        assert real() == {"3"}
        with decoder.block(3) as again:
            assert again is block
        assert real() == {"3"}
    with decoder.outer():
        assert real() == {"model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    with decoder.outer(head=False):
        assert real() == {"model.embed_tokens.weight", "model.norm.weight"}
    with decoder.outer(table=False):
        assert real() == {"model.norm.weight", "lm_head.weight"}
    assert real() == set()


def test_a_skeleton_lets_go_after_an_error(tiny_folder):
    decoder = open_model(tiny_folder("llama"), skeleton=True)
    with pytest.raises(ZeroDivisionError), decoder.block(2):
        raise ZeroDivisionError
    with pytest.raises(ZeroDivisionError), decoder.outer():
        raise ZeroDivisionError
    assert no_real_parameters(decoder.module)


def test_a_row_with_a_wrong_name_is_noticed(tiny_folder, monkeypatch):
    from dataclasses import replace

    right = FAMILIES["llama"]
    for change in (
        {"blocks": "model.blocks"},
        {"blocks": "model.norm"},
        {"embeddings": ("model.wte",)},
        {"head": "head"},
        {"attention_in": ("self_attn.qkv",)},
        {"mlp_out": ("mlp.w2",)},
    ):
        monkeypatch.setitem(FAMILIES, "llama", replace(right, **change))
        with pytest.raises(ModelError, match="llama"):
            open_model(tiny_folder("llama"))


def test_walk_notices_a_model_that_does_not_call_all_its_blocks(tiny_folder):
    decoder = open_model(tiny_folder("llama"))
    decoder.module.config.num_hidden_layers = 5
    with pytest.raises(ModelError, match="did not call all of its 8 blocks"):
        walk(decoder, draw_tokens())
    decoder.module.config.num_hidden_layers = 8
    tokens = draw_tokens()
    assert torch.equal(walk(decoder, tokens), forward(decoder.module, tokens))
