"""Windows that become one trained network, against plain forward passes and a plain training loop."""

import copy
import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from oracles import draw_windows, forward, plain_loss, plain_states, walk
from secateur import make_plan, open_model, prune, save
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, NumericsError, TrainingWarning
from secateur.methods.replace_blocks import training_windows
from secateur.models.anatomy import find
from secateur.plan.steps import ReplaceBlocks
from secateur.run_options import RunOptions
from secateur.surgery.depth.blocks import keep_blocks
from secateur.surgery.depth.replacement import network_config, new_network, with_network
from secateur.training.pairs import PairRegression, pair_bytes, store_pairs
from tiny_models import build

FOLDED = ["llama-bias", "gpt2", "phi", "gpt_neox", "mixtral", "falcon-rw", "gemma", "granite"]
ONE_STEP = {"batch_size": 5, "evaluations": 1, "learning_rate": 1e-3, "final_learning_rate": 1e-3}
"""Six windows: five to train on, all at once, one held back."""


def windows_of_text(side=None):
    return draw_windows(windows=6, positions=20, side=side)


def plan_for(decoder, windows, blocks=2, **settings):
    return make_plan(decoder, method="streamline", blocks=blocks, texts=windows, settings=settings)


def cut(decoder, windows, blocks=2, **settings):
    return prune(decoder, plan_for(decoder, windows, blocks, **settings), texts=windows)


def logits(decoder, windows):
    return forward(decoder.module, windows.tokens, windows.mask)


# The window


@pytest.mark.parametrize("network", ["none", "block"])
def test_windows_with_a_block_that_must_stay_are_passed_over(network, tiny, monkeypatch):
    decoder, windows = tiny("llama"), windows_of_text()
    free = plan_for(decoder, windows, 2, network=network)
    gone = sorted(set(range(decoder.block_count)) - set(free.kept_blocks()))
    family = replace(decoder.anatomy.family, fixed_blocks=(gone[0],), fixed_reason="for this test")
    monkeypatch.setattr(decoder, "anatomy", replace(decoder.anatomy, family=family))
    kept = plan_for(decoder, windows, 2, network=network).kept_blocks()
    assert gone[0] in kept
    assert len(kept) == decoder.block_count - 2


@pytest.mark.parametrize(("name", "seed"), [("llama", 0), ("gemma2", 5)])
def test_the_window_of_one_block_more_becomes_one(name, seed, tiny):
    decoder, windows = tiny(name), draw_windows(seed=seed)
    states = [state.double() for state in plain_states(decoder, windows.tokens)]
    for blocks in (1, 3):
        cosines = [
            float(nn.functional.cosine_similarity(states[low], states[low + blocks + 1], dim=-1).mean())
            for low in range(decoder.block_count - blocks)
        ]
        low = max(range(len(cosines)), key=cosines.__getitem__)
        (step,) = plan_for(decoder, windows, blocks).steps
        assert step.window == (low, low + blocks)
        assert step.cosine == pytest.approx(cosines[low], abs=1e-6)


def test_budgets_count_what_is_put_in(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    sizes, total = decoder.block_parameter_counts(), decoder.parameter_count
    block = make_plan(decoder, method="streamline", remove=0.3, texts=windows)
    low, high = block.steps[0].window
    assert block.parameters_after == total - (high - low) * sizes[0]
    for network, gates in (("ffn", 1), ("swiglu", 2)):
        settings = {"network": network, "inner": 20}
        plan = make_plan(decoder, method="streamline", remove=0.3, texts=windows, settings=settings)
        assert abs(plan.removed_fraction - 0.3) < 0.5 * sizes[0] / total
        assert plan.sizes_after().blocks[plan.steps[0].window[0]] == (gates + 1) * 32 * 20 + 52 * (network == "ffn")
        below = make_plan(decoder, method="streamline", target_params=0.7 * total, texts=windows, settings=settings)
        assert below.parameters_after <= 0.7 * total


@pytest.mark.parametrize(
    ("blocks", "settings", "message"),
    [
        (7, {"protect_first": 2}, "blocks=7: at most 5 blocks can be removed"),
        (8, {}, "blocks=8: at most 7 blocks can be removed"),
        (7, {"network": "ffn", "protect_last": 1}, "blocks=7: at most 6 blocks can be removed"),
        (1, {"protect_first": 7}, "all but 1 of 8 blocks are protected"),
        (7, {"network_blocks": 2}, "blocks=7: at most 6 blocks can be removed"),
        (1, {"network_blocks": 3}, "streamline: network_blocks=3"),
        (1, {"network": "ffn", "network_blocks": 2}, "network=ffn is one module"),
        (1, {"network": "rnn"}, "streamline: network=rnn"),
        (1, {"loss": "kl"}, "streamline: loss=kl"),
        (1, {"train_tokens": "few"}, "train_tokens=few: not a number"),
        (1, {"learning_rate": 0}, "streamline: learning_rate=0"),
    ],
)
def test_bad_settings(blocks, settings, message, tiny):
    with pytest.raises(InputError, match=message):
        plan_for(tiny("llama"), windows_of_text(), blocks, **settings)


@pytest.mark.parametrize(
    ("window", "message"), [((3, 3), "replaces block 3 alone"), ((5, 9), "replaces blocks 5 to 9, but this model has")]
)
def test_windows_that_cannot_be(window, message):
    with pytest.raises(InputError, match=message):
        ReplaceBlocks(method="streamline", window=window, network="block", train_tokens=1).kept_blocks(8)


@pytest.mark.parametrize("fields", [{"window": (3, 4)}, {"window": (3, 6), "network": "ffn"}])
def test_two_blocks_stand_for_three_or_more(fields):
    step = ReplaceBlocks(
        **{"method": "streamline", "network": "block", "network_blocks": 2, "train_tokens": 1} | fields
    )
    with pytest.raises(InputError, match="two can only be blocks, in place of at least three"):
        step.kept_blocks(8)


def test_a_plan_for_another_shape_is_refused(tiny):
    windows = windows_of_text()
    plan = plan_for(tiny("llama"), windows, network="ffn")
    sizes = plan.steps[0].sizes.model_copy(update={"tables": 7})
    wrong = plan.model_copy(update={"steps": (plan.steps[0].model_copy(update={"sizes": sizes}),)})
    with pytest.raises(InputError, match="made for a model of another shape"):
        prune(tiny("llama"), wrong, texts=windows)


# Training


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("name", "side"), [("llama", None), ("llama", "left"), ("gemma2", None), ("gpt2", "right")])
def test_one_step_on_pairs_is_that_of_a_plain_loop(name, side, count, tiny):
    """The loss by hooks on the whole model, the network run within it."""
    decoder, windows = tiny(name), windows_of_text(side)
    pruned = cut(decoder, windows, network_blocks=count, **ONE_STEP)
    (step,) = plan_for(decoder, windows, network_blocks=count).steps
    (low, high), real = step.window, (slice(None) if windows.mask is None else windows.mask[:5])
    targets = plain_states(decoder, windows.tokens, windows.mask)[high + 1][:5]
    module = copy.deepcopy(decoder.module).requires_grad_(False)
    blocks = find(module, decoder.anatomy.family.blocks)[low : low + count].requires_grad_(True)
    seen = []
    blocks[-1].register_forward_hook(lambda _m, _a, out: seen.append(out[0] if isinstance(out, tuple) else out))
    optimizer = torch.optim.AdamW(blocks.parameters(), lr=1e-3, weight_decay=1e-3)
    mask = {} if windows.mask is None else {"attention_mask": windows.mask[:5].long()}
    module(input_ids=windows.tokens[:5], use_cache=False, **mask)
    nn.functional.mse_loss(seen[0][real], targets[real]).backward()
    nn.utils.clip_grad_norm_(blocks.parameters(), 5.0)
    optimizer.step()
    trained = dict(pruned.block_list[low : low + count].named_parameters())
    for key, expected in blocks.named_parameters():
        # AdamW's first step is as long for a gradient of 1e-8, that of GPT-2's key biases, as for any other
        atol = 2e-3 if key.endswith("attn.c_attn.bias") else 2e-5
        torch.testing.assert_close(trained[key], expected.detach(), rtol=0, atol=atol)
    kept = [one for one in range(8) if not low + count <= one <= high]
    for place, index in enumerate(kept):
        if not low <= place < low + count:
            same = zip(pruned.block_list[place].parameters(), decoder.block_list[index].parameters(), strict=True)
            assert all(torch.equal(left, right) for left, right in same)


def test_training_lowers_the_error_and_is_recorded(tiny):
    decoder, windows = tiny("llama"), windows_of_text()
    long = {"batch_size": 1, "epochs": 8, "learning_rate": 1e-3, "patience": 9}
    pruned = cut(decoder, windows, **long)
    record = pruned.history[-1]["training (mse)"]
    assert record["best_loss"] < 0.95 * record["start_loss"]
    assert record["tokens"] == 8 * 5 * 20
    assert torch.equal(logits(cut(decoder, windows, **long), windows), logits(pruned, windows)), (
        "same seed, same result"
    )


@pytest.mark.parametrize(("name", "count"), [("llama", 1), ("llama", 2), ("gpt2", 1), ("mixtral", 1)])
def test_the_language_modelling_loss_trains_the_network_alone(name, count, tiny):
    decoder, tokens = tiny(name), windows_of_text().tokens[:5]
    windows = Windows.of(torch.cat((tokens, tokens[:1])))
    settings = {
        "loss": "lm",
        "batch_size": 5,
        "epochs": 3,
        "learning_rate": 1e-3,
        "evaluations": 3,
        "network_blocks": count,
    }
    with_mse = cut(decoder, windows, **settings | {"loss": "mse+lm"})
    assert {"training (mse)", "training (lm)"} <= set(with_mse.history[-1])
    pruned = cut(decoder, windows, **settings)
    record = pruned.history[-1]["training (lm)"]
    assert record["best_loss"] < record["start_loss"]
    held_back = Windows.of(windows.tokens[5:])
    assert plain_loss(pruned.module, held_back) == pytest.approx(record["best_loss"], rel=1e-4)
    low, high = plan_for(decoder, windows, network_blocks=count).steps[0].window
    trained = {f"{decoder.anatomy.family.blocks}.{low + place}." for place in range(count)}
    dense = keep_blocks(decoder, [one for one in range(8) if not low + count <= one <= high]).module.state_dict()
    for key, tensor in pruned.module.state_dict().items():
        assert torch.equal(tensor, dense[key]) != any(key.startswith(one) for one in trained), key


def test_pairs_on_disk_are_the_states(tiny):
    decoder, windows = tiny("llama", skeleton=True), windows_of_text("right")
    states = plain_states(tiny("llama"), windows.tokens, windows.mask)
    pairs = store_pairs(decoder, windows, (2, 4), options=RunOptions(batch_size=4))
    real = windows.mask
    for stored, state in ((pairs.entering, states[2]), (pairs.leaving, states[5])):
        assert stored.dtype == torch.bfloat16
        torch.testing.assert_close(stored[real].float(), state[real], rtol=1e-2, atol=1e-2)
    files = [file.stat().st_size for file in pairs.folder.iterdir()]
    assert sum(files) == pair_bytes(6, 20, 32)
    folder = pairs.folder
    del pairs
    assert not folder.exists()


def test_a_skeleton_trains_one_network_and_not_a_model(tiny):
    """Pairs on disk, or computed anew; near what a model in memory gives."""
    windows = windows_of_text()
    for network in ("block", "swiglu"):
        settings = {**ONE_STEP, "network": network}
        whole = logits(cut(tiny("llama"), windows, **settings), windows)
        anew = cut(tiny("llama", skeleton=True), windows, **settings, pairs="recompute")
        stored = cut(tiny("llama", skeleton=True), windows, **settings)
        assert all(p.is_meta for p in stored.block_list.parameters())
        for pruned, tolerance in ((anew, 0), (stored, 0.05)):
            torch.testing.assert_close(walk(pruned, windows.tokens), whole, rtol=0, atol=tolerance)
    with pytest.raises(InputError, match="loss=lm: the language-modelling loss needs the whole model in memory"):
        cut(tiny("llama", skeleton=True), windows, loss="lm")


# Networks without attention


@pytest.mark.parametrize("network", ["ffn", "swiglu"])
@pytest.mark.parametrize("name", FOLDED)
def test_a_new_network_leaves_the_window_out(name, network, tiny):
    """Before training it adds nothing, wherever it stands; also with a cache that asks the first block its length."""
    decoder, windows = tiny(name), draw_windows(side="left")
    for low, high in ((0, 1), (5, 7)):
        config = network_config(decoder, (low, high), network)
        fresh = {k: v.detach() for k, v in new_network(config, low, decoder.device, seed=1).named_parameters()}
        put_in = with_network(decoder, config, (low, high), fresh, {})
        shorter = keep_blocks(decoder, [one for one in range(8) if not low <= one <= high])
        real = windows.mask
        torch.testing.assert_close(logits(put_in, windows)[real], logits(shorter, windows)[real], rtol=1e-3, atol=1e-3)
        prompt = {"input_ids": windows.tokens, "attention_mask": windows.mask.long()}
        written = [
            put_in.module.generate(**prompt, max_new_tokens=6, do_sample=False, use_cache=cached)
            for cached in (True, False)
        ]
        assert torch.equal(*written)


@pytest.mark.parametrize("name", ["gemma2", "olmo2"])
def test_families_that_cannot_be_folded_say_so(name, tiny):
    with pytest.raises(ModelError, match="no module without attention can be inserted: a norm stands between"):
        plan_for(tiny(name), windows_of_text(), network="ffn")


# What is trained on, and disturbances


def test_what_it_is_trained_on(tiny_folder, tiny, tmp_path):
    decoder = open_model(tiny_folder("llama", tokenizer=True))
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 200)
    plan = make_plan(
        decoder,
        method="streamline",
        blocks=1,
        texts=str(text),
        windows=2,
        seq_len=16,
        settings={"train_tokens": "320", "batch_size": 19, "evaluations": 1},
    )
    assert plan.steps[0].train_tokens == 320
    record = prune(decoder, plan).history[-1]["training (mse)"]
    assert record["tokens"] == 19 * 16, "20 windows of the calibration text, one held back"
    given = windows_of_text()
    from secateur.methods.method import Measurements
    from secateur.methods.replace_blocks import StreamlineSettings

    measurements = Measurements(decoder, given)
    assert training_windows(measurements, StreamlineSettings(), 400) is given
    named = training_windows(measurements, StreamlineSettings(train_texts=str(text)), 400)
    assert len(named) == 20
    with pytest.raises(InputError, match="1 window to train on; some must be held out"):
        cut(tiny("llama"), Windows.of(given.tokens[:1]))


def test_a_killed_run_goes_on_and_gives_the_same(tiny, tmp_path, monkeypatch):
    decoder, windows = tiny("llama"), windows_of_text()
    settings = {"batch_size": 1, "epochs": 2, "save_minutes": 1e-9}
    plan = plan_for(decoder, windows, **settings)
    whole = prune(decoder, plan, texts=windows)
    calls, plain = [], PairRegression.forward

    def killed(self, **batch):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return plain(self, **batch)

    monkeypatch.setattr(PairRegression, "forward", killed)
    with pytest.raises(KeyboardInterrupt):
        prune(decoder, plan, texts=windows, options=RunOptions(work=tmp_path / "work"))
    begun = len(calls)
    resumed = prune(decoder, plan, texts=windows, options=RunOptions(work=tmp_path / "work"))
    monkeypatch.undo()
    assert begun < len(calls) < 2 * begun + 8
    assert torch.equal(logits(resumed, windows), logits(whole, windows))
    assert resumed.fingerprint == whole.fingerprint
    other = plan_for(decoder, windows, **settings | {"clip": 1.0})
    with pytest.raises(InputError, match="holds a run of another recipe"):
        prune(decoder, other, texts=windows, options=RunOptions(work=tmp_path / "work"))


def test_nan_keeps_the_last_good_network_and_says_so(tiny, monkeypatch):
    decoder, windows = tiny("llama"), windows_of_text()
    settings = {"batch_size": 1, "epochs": 2, "learning_rate": 3e-3, "evaluations": 10}
    plain, steps = PairRegression.forward, []

    def spoilt(self, **batch):
        loss, terms = plain(self, **batch)
        if torch.is_grad_enabled():
            steps.append(1)
        return loss * (math.nan if len(steps) > 4 else 1), terms

    monkeypatch.setattr(PairRegression, "forward", spoilt)
    with pytest.warns(TrainingWarning, match=r"stopped at step 5: .* NaN .*; the weights of step \d are kept"):
        pruned = cut(decoder, windows, **settings)
    assert torch.isfinite(logits(pruned, windows)).all()
    steps += [1] * 9
    with pytest.raises(NumericsError, match="before any improvement"):
        cut(decoder, windows, **settings)


def test_a_network_is_saved_and_opened_again(tiny_folder, tmp_path):
    decoder, windows = open_model(tiny_folder("llama", tokenizer=True)), windows_of_text()
    pruned = cut(decoder, windows, network="ffn", **ONE_STEP)
    record = save(pruned, tmp_path / "cut", check=False)
    assert record["history"][-1]["training (mse)"]["steps"] == 1
    again = open_model(tmp_path / "cut")
    torch.testing.assert_close(logits(again, windows), logits(pruned, windows), rtol=1e-4, atol=1e-4)
    assert build("llama").config.num_hidden_layers - 2 == again.block_count
