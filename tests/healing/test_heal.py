"""Every recipe on small pruned models: what it trains, what it leaves, and what it refuses."""

import copy
import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import secateur
from oracles import draw_windows, forward, plain_loss, plain_states
from secateur import heal, make_plan, open_model, prune, save
from secateur.cli.main import app
from secateur.data.windows import Windows
from secateur.errors import InputError, ModelError, NumericsError, TrainingWarning
from secateur.healing.blockwise import Lesson, lessons
from secateur.healing.data import TrainingTexts
from secateur.healing.distill import Distillation, TeacherScores, teacher_bytes
from secateur.healing.recipes import HEALING_RECIPES
from secateur.plan.plan import blocks_kept_by
from secateur.run_options import RunOptions
from secateur.training.data import LanguageModelling
from secateur.training.trainer import Tracking

TEXT = draw_windows(windows=5, positions=20)
WINDOWS = Windows.of(torch.cat((TEXT.tokens, TEXT.tokens[:1])))
"""The window that is held back is one of those trained on, so that random text can be learnt."""
BRIEF = {"batch_size": 5, "epochs": 4, "learning_rate": 1e-3, "evaluations": 4, "patience": 4}


def cut(decoder, method="last-n", amount=None, texts=None, **settings):
    amount = amount or {"blocks": 2}
    plan = make_plan(decoder, method=method, **amount, texts=texts or WINDOWS, settings=settings)
    return prune(decoder, plan, texts=texts or WINDOWS)


MISSPELT = Tracking(trackers=("tensorbord",))


def healed(decoder, by, **more):
    settings = BRIEF | more.pop("settings", {})
    return heal(decoder, by=by, texts=more.pop("texts", WINDOWS), settings=settings, **more)


@pytest.mark.parametrize("by", HEALING_RECIPES)
@pytest.mark.parametrize("name", ["llama", "gemma", "gpt2", "mixtral", "phi3"])
def test_it_learns_and_leaves_a_stock_model(by, name, tiny):
    dense = tiny(name)
    pruned = cut(dense)
    if by == "router" and name != "mixtral":
        with pytest.raises(ModelError, match="no router to train"):
            healed(pruned, by)
        return
    before = copy.deepcopy(pruned.module.state_dict())
    rate = 1e-4 if name == "mixtral" and by != "router" else 1e-3
    result = healed(pruned, by, teacher=dense, settings={"learning_rate": rate})
    assert type(result.module) is type(dense.module)
    assert result.module.state_dict().keys() == before.keys()
    assert all(torch.equal(tensor, before[key]) for key, tensor in pruned.module.state_dict().items()), "stays"
    assert result.fingerprint != pruned.fingerprint
    facts = result.history[-1]["healing"]
    runs = facts["blocks"].values() if by == "blocks" else [facts]
    assert all(run["best_loss"] < run["start_loss"] for run in runs)
    if by in ("lora", "last-layers", "full", "router"):
        assert plain_loss(result.module, Windows.of(WINDOWS.tokens[5:])) == pytest.approx(facts["best_loss"], rel=1e-3)
    changed = {key for key, tensor in result.module.state_dict().items() if not torch.equal(tensor, before[key])}
    assert changed
    blocks = f"{dense.anatomy.family.blocks}."
    if by == "last-layers":
        assert not any(key.startswith(tuple(f"{blocks}{index}." for index in range(3))) for key in changed)
    if by == "router":
        assert all(key.endswith("mlp.gate.weight") for key in changed)
    if by == "lora":
        assert all(key.startswith(blocks) and "norm" not in key and "ln_" not in key for key in changed)
    if by == "blocks":
        assert all(key.startswith(f"{blocks}5.") for key in changed), "the last block, which follows the gap"


@pytest.mark.parametrize("by", ["lora", "full", "distill"])
def test_uneven_shapes_learn_too(by, tiny):
    dense = tiny("llama")
    for pruned in (
        cut(dense, "slicegpt", {"slice": 0.25}),
        cut(dense, "streamline", network="ffn", batch_size=5, evaluations=1),
    ):
        result = healed(pruned, by, teacher=dense)
        facts = result.history[-1]["healing"]
        assert facts["best_loss"] < facts["start_loss"]
        assert result.parameter_count == pruned.parameter_count


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_weights_that_are_not_trained_may_be_in_less(name, tiny):
    pruned = cut(tiny(name, dtype=torch.bfloat16))
    assert pruned.module.dtype == torch.float32
    half = open_model(copy.deepcopy(pruned.module).bfloat16())
    result = healed(half, "last-layers")
    facts = result.history[-1]["healing"]
    assert facts["best_loss"] < facts["start_loss"]
    assert {one.dtype for one in [*result.module.parameters(), *half.module.parameters()]} == {torch.bfloat16}


def test_it_is_saved_with_its_history(tiny_folder, tmp_path):
    dense = open_model(tiny_folder("llama", tokenizer=True))
    result = healed(cut(dense), "lora")
    record = save(result, tmp_path / "healed", check=False)
    assert record["base_model"] == dense.source
    assert record["parameters_before"] == dense.parameter_count
    assert "heal, lora" in (tmp_path / "healed" / "README.md").read_text()
    again = open_model(tmp_path / "healed")
    assert [set(entry) & {"plan", "healing"} for entry in again.history] == [{"plan"}, {"healing"}]
    torch.testing.assert_close(forward(again.module, WINDOWS.tokens), forward(result.module, WINDOWS.tokens))
    alone = healed(dense, "lora")
    assert save(alone, tmp_path / "alone", check=False)["parameters_before"] == dense.parameter_count


# Objectives, against the definition


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_is_that_of_the_definition(side, temperature, tiny):
    student, teacher, windows = tiny("llama").module, tiny("llama", seed=7).module, draw_windows(side=side)
    total, count = Distillation(student, teacher, temperature=temperature)(windows.tokens, windows.mask)
    own, taught = (
        (forward(one, windows.tokens, windows.mask).double() / temperature).softmax(-1) for one in (student, teacher)
    )
    divergence = (taught * (taught / own).log()).sum(-1)[:, :-1]
    real = torch.ones_like(windows.tokens, dtype=torch.bool) if windows.mask is None else windows.mask
    wanted = real[:, 1:] & real[:, :-1]
    assert int(count) == int(wanted.sum())
    assert float(total) == pytest.approx(float(divergence[wanted].sum()) * temperature**2, rel=1e-4)


def test_a_teacher_on_disk_says_the_same(tiny, tiny_folder):
    windows = draw_windows(windows=3, side="right")
    student, teacher = tiny("llama"), tiny("llama", seed=7)
    said = TeacherScores(open_model(tiny_folder("llama", seed=7), skeleton=True), windows, top=256)
    batch = {"tokens": windows.tokens, "mask": windows.mask, "top_scores": said.scores, "top_tokens": said.tokens}
    whole = Distillation(student.module, teacher.module)(windows.tokens, windows.mask)
    stored = Distillation(student.module, None)(**batch)
    assert int(stored[1]) == int(whole[1])
    assert float(stored[0]) == pytest.approx(float(whole[0]), rel=5e-3)
    few = TeacherScores(teacher, windows, top=8)
    assert sum(file.stat().st_size for file in few.folder.iterdir()) == teacher_bytes(3, 16, 8)
    cut_off = Distillation(student.module, None)(**batch | {"top_scores": few.scores, "top_tokens": few.tokens})
    assert 0 < float(cut_off[0]) < float(whole[0]), "one token for the rest can only lose divergence"
    result = healed(cut(student), "distill", teacher=student, settings={"top": 8})
    assert result.history[-1]["healing"]["best_loss"] < result.history[-1]["healing"]["start_loss"]


def test_hidden_states_are_compared_where_blocks_were_kept(tiny):
    dense = tiny("llama")
    pruned = cut(dense, "sleb")
    kept = blocks_kept_by(pruned.history, 6)
    windows = draw_windows(side="left")
    plain, _ = Distillation(pruned.module, dense.module)(windows.tokens, windows.mask)
    both, count = Distillation(pruned.module, dense.module, hidden_weight=3.0, kept=kept)(windows.tokens, windows.mask)
    own, taught = (plain_states(one, windows.tokens, windows.mask) for one in (pruned, dense))
    errors = [
        float((own[i] - taught[k])[windows.mask].square().mean() / taught[k][windows.mask].square().mean())
        for i, k in list(enumerate(kept))[1:]
    ]
    expected = float(plain) + 3.0 * int(count) * sum(errors) / len(errors)
    assert float(both) == pytest.approx(expected, rel=1e-4)


# Blocks


def test_which_blocks_learn_what(tiny):
    dense = tiny("llama")
    dropped = cut(dense, "last-n", {"blocks": 2})
    assert lessons(dropped, dense, (0, 1, 2, 3, 4, 7)) == (Lesson(5, 8),)
    replaced = cut(dense, "replaceme", {"blocks": 2}, window=None, max_window=1)
    kept = blocks_kept_by(replaced.history, replaced.block_count)
    gaps = [place for place, block in enumerate(kept[:-1]) if kept[place + 1] > block + 1]
    gaps += [len(kept) - 1] * (kept[-1] < 7)
    expected = tuple(Lesson(place, kept[place + 1] if place + 1 < len(kept) else 8) for place in gaps)
    assert lessons(replaced, dense, kept) == expected
    assert lessons(dense, dense, tuple(range(8))) == ()
    plan = make_plan(dense, method="last-n", blocks=0)
    first = prune(dense, plan.model_copy(update={"steps": (plan.steps[0].model_copy(update={"blocks": (0,)}),)}))
    assert lessons(first, dense, tuple(range(1, 8))) == (Lesson(0, 2),)
    again = cut(dropped, "last-n", {"blocks": 1})
    assert blocks_kept_by(again.history, 5) == (0, 1, 2, 3, 7)


def test_a_block_learns_from_what_healed_blocks_give(tiny):
    """Two blocks in a row: the second reads what the first gives after it has learnt."""
    dense = tiny("llama")
    plan = make_plan(dense, method="last-n", blocks=0)
    step = plan.steps[0].model_copy(update={"blocks": (2, 4)})
    pruned = prune(dense, plan.model_copy(update={"steps": (step,)}))
    result = healed(pruned, "blocks", teacher=dense)
    outcomes = result.history[-1]["healing"]["blocks"]
    assert list(outcomes) == ["2", "3"]
    target = plain_states(dense, WINDOWS.tokens)[6][5:]
    given = plain_states(result, WINDOWS.tokens)[4][5:]
    # entering and leaving states go through bfloat16 on disk
    assert outcomes["3"]["best_loss"] == pytest.approx(float((given - target).square().mean()), rel=0.03)


def test_blocks_of_skeletons(tiny):
    memory, light = tiny("llama"), tiny("llama", skeleton=True)
    whole, thin = (healed(cut(one), "blocks", teacher=one) for one in (memory, light))
    assert all(p.is_meta for p in thin.block_list.parameters())
    with thin.block(5) as block:
        pairs = zip(block.parameters(), whole.block_list[5].parameters(), strict=True)
        assert all(torch.equal(left, right) for left, right in pairs)


# Refusals


@pytest.mark.parametrize(
    ("by", "more", "message"),
    [
        ("loar", {}, "unknown healing recipe 'loar'. Did you mean 'lora'"),
        ("lora", {"settings": {"rnak": 4}}, "unknown setting of heal --with lora 'rnak'. Did you mean 'rank'"),
        ("lora", {"settings": {"rank": 0}}, "heal --with lora: rank=0"),
        ("distill", {}, "this recipe needs the dense model as teacher; name it"),
        ("lora", {"texts": Windows.of(WINDOWS.tokens[:1])}, "1 window to train on; some must be held out"),
        ("lora", {"settings": {"batch_size": 50}}, "5 windows to train on and 1 held out are too few"),
        (
            "lora",
            {"tracking": Tracking(trackers=("tensorbord",))},
            "unknown tracker 'tensorbord'. Did you mean 'tensorboard'",
        ),
        ("lora", {"texts": None, "tokens": 10}, "10 tokens are fewer than two windows"),
    ],
)
def test_bad_input(by, more, message, tiny):
    with pytest.raises(InputError, match=message):
        healed(cut(tiny("llama")), by, **more)


def test_teachers_that_do_not_fit(tiny, tiny_folder):
    dense = tiny("llama")
    pruned = cut(dense)
    other = copy.deepcopy(dense.module)
    other.resize_token_embeddings(300)
    with pytest.raises(InputError, match=r"the teacher .* has 300 tokens where the model has 256"):
        healed(pruned, "distill", teacher=open_model(other))
    sliced = cut(dense, "slicegpt", {"slice": 0.25})
    with pytest.raises(InputError, match="hidden states are in other coordinates"):
        healed(sliced, "blocks", teacher=dense)
    with pytest.raises(InputError, match="hidden_weight: hidden states of the two models"):
        healed(sliced, "distill", teacher=dense, settings={"hidden_weight": 1.0})
    with pytest.raises(InputError, match="nothing to heal"):
        healed(dense, "blocks", teacher=dense)
    with pytest.raises(InputError, match="needs the whole model in memory"):
        healed(cut(tiny("llama", skeleton=True)), "full")


def test_nan_and_other_recipes(tiny, tmp_path, monkeypatch):
    pruned = cut(tiny("llama"))
    healed(pruned, "full", options=RunOptions(work=tmp_path / "work"))
    with pytest.raises(InputError, match=r"holds a run of another recipe \(other .*settings"):
        healed(pruned, "full", options=RunOptions(work=tmp_path / "work"), settings={"clip": 0.3})
    plain, steps = LanguageModelling.forward, []

    def spoilt(self, **batch):
        loss, terms = plain(self, **batch)
        if torch.is_grad_enabled():
            steps.append(1)
        return loss * (math.nan if len(steps) > after else 1), terms

    monkeypatch.setattr(LanguageModelling, "forward", spoilt)
    after = 2
    with pytest.warns(TrainingWarning, match=r"healing: stopped at step 3: .* NaN .*; the weights of step \d are kept"):
        healed(pruned, "full")
    after = 0
    with pytest.raises(NumericsError, match="before any improvement"):
        healed(pruned, "full")


def test_trackers_that_are_not_installed(tiny, monkeypatch):
    monkeypatch.setattr("secateur.training.trainer.find_spec", lambda _: None)
    with pytest.raises(InputError, match=r"wandb is not installed: pip install 'secateur\[wandb\]'"):
        healed(cut(tiny("llama")), "lora", tracking=Tracking(trackers=("wandb",)))


def test_killed_by_the_system_and_started_again(tiny_folder, tmp_path):
    """SIGKILL in the middle of a step: the same command goes on, to the bit, and as if it had never been killed."""
    model, text = tiny_folder("llama", tokenizer=True), tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 100)
    words = ["heal", str(model), "--with", "full", "--texts", str(text), "--seq-len", "16", "--tokens", "480"]
    words += ["--no-check", "--set", "save_minutes=1e-9"]
    environment = {**os.environ, "PYTHONPATH": str(Path(secateur.__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "secateur", *words, "-o", str(tmp_path / "cut")]
    cut_short = subprocess.Popen(command, env=environment)
    work = tmp_path / "cut.training"
    while not any(int(state.name.split("-")[1]) > 5 for state in work.glob("state-*[0-9]")):
        assert cut_short.poll() is None, "it ended before it could be killed"
        time.sleep(0.01)
    cut_short.kill()
    cut_short.wait()
    assert not (tmp_path / "cut").exists()
    logged = (work / "log.jsonl").read_text().count("\n")
    for name in ("whole", "cut"):
        app([*words, "-o", str(tmp_path / name)], standalone_mode=False)
    assert 5 < logged < 29
    assert not work.exists()
    left, right = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "cut"))
    assert left.keys() == right.keys()
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# Instruction data


def rows(path, *items):
    path.write_text("\n".join(json.dumps(item) for item in items))
    return str(path)


def test_only_answers_are_learnt(tiny_folder, tmp_path):
    decoder = open_model(tiny_folder("llama", tokenizer=True))
    tokenizer = decoder.tokenizer
    chat = [
        {"role": "user", "content": "one two"},
        {"role": "assistant", "content": "three"},
        {"role": "user", "content": "four"},
        {"role": "assistant", "content": "five six"},
    ]
    source = rows(tmp_path / "chat.jsonl", *[{"messages": chat}] * 3)
    from secateur.healing.instructions import open_instructions

    tokenizer.chat_template = None
    alpaca = rows(tmp_path / "alpaca.jsonl", *[{"instruction": "count", "input": "one two", "output": "three"}] * 4)
    (item, *_) = open_instructions(alpaca, tokenizer, examples=9, seq_len=60)
    learnt = item["labels"][item["labels"] >= 0]
    assert tokenizer.decode(learnt).startswith("three")
    assert "count" in tokenizer.decode(item["tokens"][item["mask"]])
    with pytest.raises(InputError, match="the tokenizer has no chat template"):
        open_instructions(source, tokenizer, examples=9, seq_len=60)
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = open_instructions(source, tokenizer, examples=9, seq_len=63)
    assert len(data) == 3
    item = data[0]
    assert tokenizer.decode(item["labels"][item["labels"] >= 0]) == "three\nfive six\n"
    assert torch.equal(item["tokens"][item["labels"] >= 0], item["labels"][item["labels"] >= 0])
    short = open_instructions(source, tokenizer, examples=9, seq_len=30)
    assert short.notes
    assert len(open_instructions(alpaca, tokenizer, examples=2, seq_len=60)) == 2
    result = heal(
        decoder,
        tokens=600,
        settings={"batch_size": 1},
        texts=TrainingTexts(source=source, instructions=True, seq_len=60),
    )
    assert result.history[-1]["healing"]["texts"]["windows"] == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("x.jsonl", '{"text": "one"}', "no instruction data: a row has text; wanted are 'messages'"),
        ("x.jsonl", "", "no example with an answer"),
        ("x.txt", "one two", "cannot read rows from"),
    ],
)
def test_data_without_answers(name, content, message, tiny_folder, tmp_path):
    decoder = open_model(tiny_folder("llama", tokenizer=True))
    (tmp_path / name).write_text(content)
    with pytest.raises(InputError, match=message):
        heal(decoder, texts=TrainingTexts(source=str(tmp_path / name), instructions=True, seq_len=40))
    with pytest.raises(InputError, match="instruction data need a source"):
        heal(decoder, texts=TrainingTexts(instructions=True))
