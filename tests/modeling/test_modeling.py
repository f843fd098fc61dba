"""The modelling file that travels with the weights, against what users of transformers do with a model."""

import copy
import json

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from oracles import draw_tokens, draw_windows, forward, pad
from secateur import open_model, save
from secateur.checkpoints.check import record_expected, reopen
from secateur.modeling import SecateurConfig, SecateurForCausalLM, SecateurModel
from secateur.surgery.hidden.own_bases import slice_by_principal_directions
from tiny_models import build, build_tokenizer

PLAIN = {
    "vocab_size": 256,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "widths": [24, 16, 16, 8, 24, 32, 32],
    "shortcuts": [True, False, True, True, True, True],
    "intermediate_sizes": [48, 24, 40],
    "experts": [0, 4, 0],
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
VARIANTS = {
    "plain": {},
    "rope in some blocks": {"rope_blocks": [True, False, True]},
    "learned": {"positions": "learned"},
    "learned-unpadded": {"positions": "learned-unpadded", "gated": False, "hidden_act": "relu"},
    "alibi": {"positions": "alibi", "alibi_slopes": [0.25, 0.0625, 0.5, 0.125]},
    "sliding": {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"], "sliding_window": 4},
    "parallel": {"parallel": True, "widths": [24, 16, 16, 32], "shortcuts": [True, False, True]},
    "clip_qkv": {"clip_qkv": 0.3},
    "qk_norm rms": {"qk_norm": "rms"},
    "qk_norm layernorm": {"qk_norm": "layernorm", "qk_norm_per_head": True},
    "biases": dict.fromkeys(("qkv_bias", "attention_out_bias", "mlp_bias", "mlp_out_bias", "head_bias"), True),
}


def drawn(**settings):
    """A model every parameter of which shows in its logits."""
    config = SecateurConfig(**{**copy.deepcopy(PLAIN), **settings})
    with torch.random.fork_rng(devices=[]):
        module = SecateurForCausalLM(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "_norm" in name else noise / parameter.shape[-1] ** 0.5)
    return module


@pytest.fixture(scope="module", params=VARIANTS)
def model(request):
    return drawn(**VARIANTS[request.param])


@pytest.fixture(scope="module")
def plain():
    return drawn()


@pytest.fixture(scope="module")
def sliced():
    """A tiny llama with uneven hidden states, as the library makes it."""
    decoder = open_model(build("llama", blocks=3), tokenizer=build_tokenizer())
    return slice_by_principal_directions(decoder, draw_windows(), [24, 16, 8], 16)[0]


def test_cached_generation_is_what_full_passes_give(model):
    tokens, mask = pad(draw_tokens(windows=3, positions=12), "left")
    given = {"attention_mask": mask.long()}
    settings = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "output_logits": True}
    cached = model.generate(tokens, use_cache=True, return_dict_in_generate=True, **settings, **given)
    plainly = model.generate(tokens, use_cache=False, return_dict_in_generate=True, **settings, **given)
    assert torch.equal(cached.sequences, plainly.sequences)
    torch.testing.assert_close(torch.stack(cached.logits), torch.stack(plainly.logits), rtol=1e-4, atol=1e-5)
    assert cached.past_key_values.get_seq_length() == 12 + 5 - 1


@pytest.mark.parametrize("side", [None, "left"])
def test_a_cache_continues_where_it_was_left(model, side):
    tokens, mask = pad(draw_tokens(windows=3, positions=12), side)
    given = torch.ones_like(tokens) if mask is None else mask.long()
    with torch.no_grad():
        first = model(input_ids=tokens[:, :9], attention_mask=given[:, :9], use_cache=True)
        rest = model(input_ids=tokens[:, 9:], attention_mask=given, past_key_values=first.past_key_values)
    expected = forward(model, tokens, mask)[:, 9:]
    torch.testing.assert_close(rest.logits, expected, rtol=1e-4, atol=1e-5)


def test_a_token_never_sees_what_follows_it(model):
    tokens = draw_tokens()
    changed = tokens.clone()
    changed[:, 10:] = draw_tokens(seed=1)[:, 10:]
    found, before = forward(model, changed), forward(model, tokens)
    torch.testing.assert_close(found[:, :10], before[:, :10], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[:, 10:], before[:, 10:], atol=1e-2)


@pytest.mark.parametrize("name", VARIANTS)
def test_left_padding_does_not_change_real_positions(name):
    model = drawn(**VARIANTS[name])
    tokens, mask = pad(draw_tokens(), "left")
    found = forward(model, tokens, mask)
    for row, real, shown in zip(tokens, mask, found, strict=True):
        alone = row[real][None]
        given = {}
        if name == "learned":  # counted with padding, as in the stock model
            given["position_ids"] = real.nonzero().T
        with torch.no_grad():
            expected = model(input_ids=alone, use_cache=False, **given).logits[0]
        torch.testing.assert_close(shown[real], expected, rtol=1e-4, atol=1e-5)


def test_sdpa_equals_eager(model):
    tokens, mask = pad(draw_tokens(), "left")
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    model.set_attn_implementation("sdpa")
    for one in (None, mask):
        real = torch.ones_like(tokens, dtype=torch.bool) if one is None else one
        found, expected = forward(model, tokens, one)[real], forward(eager, tokens, one)[real]
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert eager.config._attn_implementation != model.config._attn_implementation


def test_a_sliding_window_hides_what_is_far():
    model = drawn(layer_types=["sliding_attention"] * 3, sliding_window=3, experts=None)
    tokens = draw_tokens(windows=1, positions=20)
    changed = tokens.clone()
    changed[:, 0] = 5
    found, before = forward(model, changed)[0], forward(model, tokens)[0]
    assert torch.allclose(found[7:], before[7:], atol=1e-6), "three blocks see 3 · (3 − 1) positions back"
    assert not torch.allclose(found[6], before[6], atol=1e-6)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_gradient_checkpointing_gives_the_same_gradients(model):
    tokens = draw_tokens()

    def gradients(checkpointing):
        trained = copy.deepcopy(model).train().requires_grad_(True)
        runs = []
        trained.model.layers[0].self_attn.register_forward_hook(lambda *_: runs.append(1))
        if checkpointing:
            trained.gradient_checkpointing_enable()
        trained(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        assert len(runs) == 1 + checkpointing
        return {name: one.grad for name, one in trained.named_parameters()}

    plainly, checkpointed = gradients(False), gradients(True)
    silent = {name for name, one in plainly.items() if one is None}
    assert all("experts" in name for name in silent)
    for name in plainly.keys() - silent:
        torch.testing.assert_close(checkpointed[name], plainly[name], rtol=1e-4, atol=1e-6)
        assert plainly[name].abs().sum() > 0 or "k_proj.bias" in name, name


def test_a_folder_opens_with_the_auto_classes(model, tmp_path):
    model.save_pretrained(tmp_path)
    tokens = draw_tokens()
    again, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(again) is SecateurForCausalLM
    assert not any(report.values())
    assert again.config.widths == model.config.widths
    assert torch.equal(forward(again, tokens), forward(model, tokens))
    body = AutoModel.from_pretrained(tmp_path)
    assert type(body) is SecateurModel
    with torch.no_grad():
        states = body(input_ids=tokens, output_hidden_states=True)
        assert torch.equal(again.lm_head(states.last_hidden_state), forward(model, tokens))
    each = 1 if model.config.parallel else 2
    assert [state.shape[-1] for state in states.hidden_states[:-1]] == model.config.widths[:-1:each]


def test_attention_weights_and_inputs_as_embeddings(plain):
    eager = copy.deepcopy(plain)
    eager.set_attn_implementation("eager")
    tokens = draw_tokens()
    with torch.no_grad():
        weights = eager(input_ids=tokens, output_attentions=True, use_cache=False).attentions
        embedded = plain(inputs_embeds=plain.get_input_embeddings()(tokens), use_cache=False).logits
    assert [tuple(one.shape) for one in weights] == [(4, 4, 16, 16)] * 3
    torch.testing.assert_close(weights[0].sum(-1), torch.ones(4, 4, 16))
    assert torch.equal(embedded, forward(plain, tokens))
    with pytest.raises(ValueError, match="exactly one of input_ids and inputs_embeds"):
        plain(input_ids=tokens, inputs_embeds=plain.get_input_embeddings()(tokens))


def test_logits_to_keep_and_labels(plain):
    tokens = draw_tokens()
    whole = forward(plain, tokens)
    with torch.no_grad():
        assert torch.equal(plain(input_ids=tokens, logits_to_keep=3).logits, whole[:, -3:])
        loss = plain(input_ids=tokens, labels=tokens).loss
    expected = torch.nn.functional.cross_entropy(whole[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(loss, expected)


SCRIPT = """
import json, sys, torch
from transformers import AutoModelForCausalLM
folder = sys.argv[1]
try:
    AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    refused = "no"
except ValueError as error:
    refused = str(error)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
tokens = torch.tensor(json.loads(sys.argv[2]))
with torch.no_grad():
    logits = model(input_ids=tokens).logits
made = model.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
print(json.dumps({"refused": refused, "logits": logits.tolist(), "made": made.tolist(),
                  "secateur": "secateur" in sys.modules, "class": type(model).__module__}))
"""


def test_a_saved_folder_opens_where_secateur_is_not(sliced, tmp_path, warm_python):
    save(sliced, tmp_path / "cut", check=False)
    tokens = draw_tokens(windows=2, positions=8)
    done = warm_python.run("-c", SCRIPT, tmp_path / "cut", json.dumps(tokens.tolist()))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert "trust_remote_code" in found["refused"]
    assert not found["secateur"]
    assert found["class"].startswith("transformers_modules")
    torch.testing.assert_close(torch.tensor(found["logits"]), forward(sliced.module, tokens), rtol=1e-5, atol=1e-5)
    expected = sliced.module.generate(tokens, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert found["made"] == expected.tolist()
    body = AutoModel.from_pretrained(tmp_path / "cut")
    assert type(body) is SecateurModel
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert set(config["auto_map"]) >= {"AutoModel", "AutoConfig"}
    assert config["embedding_size"] == body.get_input_embeddings().embedding_dim


def test_what_others_save_again_opens_too(sliced, tmp_path):
    """As after a merge of adapters by peft: the modelling file must go with it."""
    save(sliced, tmp_path / "cut", check=False)
    AutoModelForCausalLM.from_pretrained(tmp_path / "cut").save_pretrained(tmp_path / "again")
    (result,) = reopen([record_expected(sliced, tmp_path / "expected.npz").job(tmp_path / "again")])
    assert result["passed"]


def test_lora_learns_saves_and_merges(sliced, tmp_path):
    peft = pytest.importorskip("peft")
    tokens = draw_tokens()
    torch.manual_seed(0)
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
    tuned = peft.get_peft_model(copy.deepcopy(sliced.module), settings)
    names = {name.partition(".lora_A")[0].split(".")[-1] for name, _ in tuned.named_parameters() if "lora_A" in name}
    assert names >= {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    optimiser = torch.optim.AdamW((p for p in tuned.parameters() if p.requires_grad), lr=1e-2)
    losses = []
    for _ in range(3):
        loss = tuned(input_ids=tokens, labels=tokens, use_cache=False).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert losses[2] < losses[1] < losses[0]
    tuned.eval().save_pretrained(tmp_path)
    expected = forward(tuned, tokens)
    assert not torch.allclose(expected, forward(sliced.module, tokens), atol=1e-3)
    again = peft.PeftModel.from_pretrained(copy.deepcopy(sliced.module), tmp_path).eval()
    assert torch.equal(forward(again, tokens), expected)
    merged = forward(tuned.merge_and_unload(), tokens)
    assert float((merged - expected).abs().max() / expected.abs().max()) < 1e-5


def test_lm_eval_scores_with_the_models_own_probabilities(sliced):
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM

    tokenizer = build_tokenizer()
    pairs = [("Roses are", " red"), ("Violets", " are blue")]
    scorer = HFLM(pretrained=sliced.module, tokenizer=tokenizer, batch_size=2, max_length=32)
    requests = [Instance("loglikelihood", {}, pair, index) for index, pair in enumerate(pairs)]
    found = scorer.loglikelihood(requests, disable_tqdm=True)
    for (context, continuation), (score, _) in zip(pairs, found, strict=True):
        before = len(tokenizer(context).input_ids)
        tokens = torch.tensor([tokenizer(context + continuation).input_ids])
        chances = forward(sliced.module, tokens).log_softmax(-1)[0, before - 1 : -1]
        assert score == pytest.approx(float(chances.gather(1, tokens[0, before:, None]).sum()), abs=1e-4)


def test_accelerate_prepares_and_steps(sliced):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    model = copy.deepcopy(sliced.module).train().requires_grad_(True)
    model, optimiser = accelerator.prepare(model, torch.optim.SGD(model.parameters(), lr=0.05))
    tokens = draw_tokens()
    losses = []
    for _ in range(2):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        losses.append(loss.item())
        optimiser.zero_grad()
        accelerator.backward(loss)
        optimiser.step()
    assert losses[1] < losses[0]


@pytest.mark.parametrize("name", ["widths", "shortcuts", "intermediate_sizes", "experts", "rope_blocks", "layer_types"])
def test_a_list_of_the_wrong_length_is_refused(name):
    right = SecateurConfig(**PLAIN)
    with pytest.raises((ValueError, StrictDataclassError), match=name):
        SecateurConfig(**{**PLAIN, name: getattr(right, name)[:-1]})


def test_a_change_of_width_without_a_shortcut_is_refused():
    with pytest.raises((ValueError, StrictDataclassError), match="from 24 to 16 without a shortcut matrix"):
        SecateurConfig(**{**PLAIN, "shortcuts": [False] * 6})


def test_parallel_blocks_need_one_width_each():
    with pytest.raises((ValueError, StrictDataclassError), match="widths has 7 entries; 4 are needed"):
        SecateurConfig(**{**PLAIN, "parallel": True})


def test_a_configuration_survives_a_folder(tmp_path):
    config = SecateurConfig(**{**PLAIN, "eos_token_id": [2, 3], "qk_norm": "rms"})
    config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert type(again) is SecateurConfig
    assert again.to_diff_dict() == config.to_diff_dict()


def test_experts_are_a_plain_weighted_sum(plain):
    """Each chosen expert is what the mixture says where the router likes it alone."""
    mlp, picked = plain.model.layers[1].mlp, plain.config.num_experts_per_tok
    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        best, chosen = mlp.gate(x).softmax(-1).topk(picked)
        alone = copy.deepcopy(mlp)
        alone.picked = 1
        expected = torch.zeros(5, 24)
        for number in range(4):
            alone.gate.weight.zero_()
            for row in range(5):
                alone.gate.weight[number] = x[row]
                share = (best[row] * (chosen[row] == number)).sum() / best[row].sum()
                expected[row] += share * alone(x[row : row + 1])[0]
        torch.testing.assert_close(mlp(x), expected)
