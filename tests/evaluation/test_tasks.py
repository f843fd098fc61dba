"""Tasks through the harness: the same numbers as plain forwards give, and what is refused."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from secateur import evaluate, make_plan, open_model, prune
from secateur.errors import InputError, NumericsError
from secateur.evaluation import catalogue, cloze
from secateur.evaluation.tasks import TaskRequest, batch_for
from secateur.jobs.evaluate import measure_reference
from tiny_models import save_tiny

QUESTIONS = [
    {"question": "two and two", "options": [" four", " a fish", " ten"], "answer": 0},
    {"question": "a cat has", "options": [" wheels", " paws", " keys"], "answer": 1},
    {"question": "the sky is", "options": [" loud", " long", " blue"], "answer": 2},
    {"question": "one", "options": [" two", " and so it goes on", "!"], "answer": 1},
]
CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs:
  data_files: {{validation: {file}}}
validation_split: validation
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
ROLLING = """
task: plain_text
dataset_path: json
dataset_kwargs:
  data_files: {validation: questions.jsonl}
validation_split: validation
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
"""
WRITING = """
task: writing
dataset_path: json
dataset_kwargs:
  data_files: {validation: questions.jsonl}
validation_split: validation
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "the truth"
generation_kwargs: {until: ["."], max_gen_toks: 4}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
FILTERS = """
filter_list:
  - name: none-matches
    filter: [{function: regex, regex_pattern: "(nothing like it)", fallback: "no"}, {function: take_first}]
  - name: all-match
    filter: [{function: regex, regex_pattern: "(nothing like it)", fallback: "the truth"}, {function: take_first}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("mine")
    (where / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (where / "choice.yaml").write_text(CHOICE.format(name="choice", file="questions.jsonl"))
    (where / "again.yaml").write_text(CHOICE.format(name="again", file="questions.jsonl"))
    (where / "rolling.yaml").write_text(ROLLING)
    return where


@pytest.fixture(scope="module")
def pair(tiny):
    dense = tiny("llama", tokenizer=True)
    return prune(dense, make_plan(dense, method="last-n", blocks=4)), dense


@torch.no_grad()
def log_likelihood(decoder, context, option):
    """Sum over the option's tokens, and their number, by one plain forward."""
    before, option = (decoder.tokenizer(text, add_special_tokens=False)["input_ids"] for text in (context, option))
    logits = decoder.module(torch.tensor([before + option])).logits[0].double().log_softmax(-1)
    rows = range(len(before) - 1, len(before) + len(option) - 1)
    return sum(float(logits[row, token]) for row, token in zip(rows, option, strict=True)), len(option)


def picked(decoder, *, per_token):
    found = []
    for row in QUESTIONS:
        scored = [log_likelihood(decoder, row["question"], option) for option in row["options"]]
        values = [total / (count if per_token else 1) for total, count in scored]
        found.append(values.index(max(values)))
    return found


def test_a_folder_of_tasks_gives_what_plain_forwards_give(folder, pair):
    results = evaluate(
        pair[0], against=pair[1], tasks=TaskRequest.of(f"{folder}/choice.yaml,{folder}/again.yaml", stability=True)
    )
    found = {(one.task, one.role, one.measure): one.value for one in results}
    right = [row["answer"] for row in QUESTIONS]
    chosen = {}
    for role, decoder in zip(("model", "against"), pair, strict=True):
        for measure, per_token in (("acc", False), ("acc_per_token", True)):
            chosen[role] = picked(decoder, per_token=per_token)
            expected = sum(one == other for one, other in zip(chosen[role], right, strict=True)) / len(right)
            for task in ("choice", "again", "average"):
                assert found[task, role, measure] == pytest.approx(expected), (task, role, measure)
    changed = sum(a != b for a, b in zip(chosen["model"], chosen["against"], strict=True))
    assert found["choice", "model", "flips"] == changed / len(right) == found["average", "model", "flips"]
    assert 0 <= found["choice", "model", "stability"] <= 1
    assert all(one.settings["questions"] == 4 for one in results if one.task == "choice")
    fingerprints = {one.texts["fingerprint"] for one in results if one.task in ("choice", "again")}
    assert len(fingerprints) == 1, "the same questions, whoever is asked"


def test_a_skeleton_is_read_for_it_and_let_go(folder, pair, tiny):
    skeleton = tiny("llama", tokenizer=True, skeleton=True)
    (memory, *_), (read, *_) = (evaluate(one, tasks=f"{folder}/choice.yaml") for one in (pair[1], skeleton))
    assert read.value == memory.value
    assert all(parameter.is_meta for parameter in skeleton.module.parameters())


def test_the_bundled_task_is_far_above_chance_and_a_model_is_itself(bundled):
    results = evaluate(bundled, against=bundled, tasks=TaskRequest.of(cloze.NAME, limit=24, stability=True))
    found = {(one.role, one.measure): one.value for one in results}
    assert found["model", "acc"] == found["against", "acc"] > 0.5, "chance is 0.25"
    assert found["model", "stability"] == 1
    assert found["model", "flips"] == 0


def test_nothing_but_ours_is_printed(folder, pair, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)  # where there is no git
    evaluate(pair[0], tasks=TaskRequest.of(str(folder / "choice.yaml"), limit=2))
    assert capfd.readouterr() == ("", "")


def test_tasks_alone_read_no_text_and_both_can_be_had(folder, pair, tmp_path):
    only = evaluate(pair[0], tasks=TaskRequest.of(str(folder / "rolling.yaml"), limit=2))
    assert {one.task for one in only} == {"plain_text"}
    (tmp_path / "some.txt").write_text("some text " * 40)
    both = evaluate(
        pair[0],
        texts=str(tmp_path / "some.txt"),
        seq_len=16,
        tasks=TaskRequest.of(str(folder / "rolling.yaml"), limit=2),
    )
    assert [one.measure for one in both] == ["perplexity", *(one.measure for one in only)]


def test_a_batch_on_a_gpu_leaves_room_for_its_logits(monkeypatch):
    table = SimpleNamespace(num_embeddings=128_256)
    module = SimpleNamespace(dtype=torch.bfloat16, get_input_embeddings=lambda: table)
    model = SimpleNamespace(device=torch.device("cuda"), max_positions=8192, module=module)
    for gigabytes, expected in ((0.1, 1), (8, 4), (140, 64)):
        monkeypatch.setattr("secateur.evaluation.tasks.free_memory", lambda _, free=gigabytes: free * 1e9)
        assert batch_for(model) == expected
    model.device = torch.device("cpu")
    assert batch_for(model) == 8


def test_nan_is_never_an_answer(folder, tmp_path):
    damaged = open_model(save_tiny("llama", tmp_path / "model", tokenizer=True))
    with torch.no_grad():
        damaged.block_list[3].mlp.down_proj.weight[0, 0] = math.nan
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "writing.yaml").write_text(WRITING)
    for task, what in ((folder / "choice.yaml", "answers"), (tmp_path / "writing.yaml", "logits")):
        with pytest.raises(NumericsError, match=f"NaN or infinity in the {what}"):
            evaluate(damaged, tasks=str(task))


def test_several_filters_of_one_metric_are_told_apart(pair, tmp_path):
    (tmp_path / "questions.jsonl").write_text("\n".join(map(json.dumps, QUESTIONS)))
    (tmp_path / "writing.yaml").write_text(WRITING + FILTERS)
    results = evaluate(pair[0], tasks=str(tmp_path / "writing.yaml"))
    assert {one.measure: (one.value, one.spread) for one in results} == {
        "exact_match,none-matches": (0.0, {"stderr": 0.0}),
        "exact_match,all-match": (1.0, {"stderr": 0.0}),
    }


def test_a_reference_of_other_questions_is_refused(folder, pair):
    cut, dense = pair
    reference = measure_reference(
        dense, texts="python-stdlib", windows=1, tasks=TaskRequest.of(str(folder / "choice.yaml"), limit=2)
    )
    found = evaluate(cut, against=reference, tasks=TaskRequest.of(str(folder / "choice.yaml"), limit=2))
    assert {one.role for one in found} == {"model", "against"}
    with pytest.raises(InputError, match="was not asked the same questions of choice"):
        evaluate(cut, against=reference, tasks=TaskRequest.of(str(folder / "choice.yaml"), limit=3))


def test_what_cannot_be_asked(folder, pair, tmp_path):
    cut, dense = pair
    (tmp_path / "lost.yaml").write_text(CHOICE.format(name="lost", file="nowhere.jsonl"))
    (tmp_path / "empty").mkdir()
    cases = [
        ({"tasks": "hellaswagg"}, "unknown task 'hellaswagg'. Near it: hellaswag"),
        ({"tasks": "stdlib-close"}, "Near it: stdlib-cloze"),
        ({"tasks": " , "}, "no task named"),
        ({"tasks": str(folder), "against": dense, "stability": True}, "plain_text has neither options"),
        ({"tasks": str(folder), "stability": True}, "name the dense one"),
        ({"tasks": str(tmp_path / "empty")}, "no task here"),
        ({"tasks": str(tmp_path / "none.yaml")}, "no such file"),
        ({"tasks": str(tmp_path / "lost.yaml")}, "its data cannot be loaded"),
        ({"tasks": str(folder / "choice.yaml"), "limit": 0}, "limit 0"),
        ({"tasks": str(folder / "choice.yaml"), "shots": -1}, "shots -1"),
    ]

    def ask(against=None, **given):
        evaluate(cut, windows=1, against=against, tasks=TaskRequest.of(**given))

    for given, message in cases:
        with pytest.raises(InputError) as error:
            ask(**given)
        assert message in str(error.value)


def test_names():
    assert catalogue.task_names("piqa, commonsense") == ["piqa", *(one for one in catalogue.SEVEN if one != "piqa")]
    found = {name: catalogue.find_task(name) for name in (*catalogue.SEVEN, "mmlu", "ai2_arc")}
    assert all(found[name].kind == "task" and found[name].file.is_file() for name in catalogue.SEVEN)
    assert found["mmlu"].kind == found["ai2_arc"].kind == "several"
