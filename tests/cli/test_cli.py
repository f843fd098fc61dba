"""The command line: what it writes, what it prints, and how it refuses bad input (exit code 2, 130 for Ctrl-C)."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from secateur import files as scratch
from secateur import open_model
from secateur.cli import main as cli
from secateur.cli import prune as pruning
from secateur.jobs.score import ScoreJob
from secateur.methods.search import trials
from secateur.plan.plan import Plan
from tiny_models import save_tiny


@pytest.fixture(scope="module")
def model(tiny_with_tokenizer):
    return tiny_with_tokenizer


@pytest.fixture(scope="module")
def windows(window_file):
    return window_file


def test_the_whole_job(run, model, windows, tmp_path):
    code, out, _ = run("score", model, "--texts", windows, "-o", "scores", "--also", "perplexity", "--also", "taylor")
    assert code == 0
    assert "block influence" in out
    names = {file.name for file in (tmp_path / "scores").iterdir()}
    assert names == {"scores.json", "redundancy.png", "cosine.png", "cka.png", "secateur.json"}
    scores = json.loads((tmp_path / "scores" / "scores.json").read_text())
    assert np.asarray(scores["cosine"]).shape == (9, 9)

    code, out, _ = run(
        "plan", model, "--method", "shortgpt", "--remove", "25%", "--texts", windows,
        "--scores", "scores/scores.json", "-o", "plan.json",
    )  # fmt: skip
    assert code == 0
    plan = Plan.read("plan.json")
    assert f"{plan.parameters_after:,}" in out

    edited = json.loads((tmp_path / "plan.json").read_text())
    edited["steps"][0]["blocks"] = [1, 6]
    (tmp_path / "plan.json").write_text(json.dumps(edited))
    code, out, err = run("prune", model, "--plan", "plan.json", "-o", "cut", "--json")
    assert code == 0, err
    record = json.loads(out)
    assert record["check"]["passed"]
    assert open_model("cut").block_count == 6
    assert "fresh process: same logits" in err

    code, out, _ = run("eval", "cut", "--against", model, "--texts", windows, "-o", "eval", "--json")
    assert code == 0
    results = [json.loads(line) for line in (tmp_path / "eval" / "results.jsonl").read_text().splitlines()]
    assert json.loads(out) == results
    assert [r["role"] for r in results] == ["model", "against"]
    assert results[0]["texts"] == results[1]["texts"]
    assert results[0]["value"] != results[1]["value"]

    code, out, err = run("push", "cut", "me/small", "--dry-run", "--json")
    assert code == 0
    said = json.loads(out)
    assert said["files"]["model.safetensors"] == (tmp_path / "cut" / "model.safetensors").stat().st_size
    assert said["private"]
    assert "nothing was sent" in err


def test_tasks_and_speed_of_the_bundled_model(run, tmp_path):
    words = ["--tasks", "stdlib-cloze", "--limit", "2", "--stability", "-o", "eval"]
    code, out, err = run("eval", "bundled", "--against", "bundled", *words)
    assert code == 0, err
    assert "stability" in out
    assert "perplexity" not in out
    results = [json.loads(line) for line in (tmp_path / "eval" / "results.jsonl").read_text().splitlines()]
    assert {(one["measure"], one["value"]) for one in results} >= {("stability", 1.0), ("flips", 0.0)}

    words = ["--batch-sizes", "1", "--prompts", "4", "--new-tokens", "2", "--repeats", "1", "-o", "bench"]
    code, out, err = run("bench", "bundled", "--against", "bundled", *words, "--json")
    assert code == 0, err
    results = json.loads(out)
    assert results == [json.loads(line) for line in (tmp_path / "bench" / "results.jsonl").read_text().splitlines()]
    assert {one["role"] for one in results} == {"model", "against"}
    assert "decode tokens/s" in run("bench", "bundled", *words[:-2])[1]


def test_measuring_never_replaces_the_model(run, model, tmp_path):
    assert run("prune", model, "--method", "last-n", "--blocks", "1", "--no-check", "-o", "cut")[0] == 0
    for words in (["eval", "cut"], ["bench", "cut"]):
        code, _, err = run(*words, "-o", "cut")
        assert code == 2
        assert "is the model being read" in err
    assert (tmp_path / "cut" / "model.safetensors").is_file()


def test_default_folders(run, model, windows, tmp_path):
    assert run("prune", model, "--method", "last-n", "--blocks", "1", "--no-check")[0] == 0
    assert run("plan", model, "--method", "last-n", "--blocks", "1")[0] == 0
    made = sorted(path.name.rsplit("-", 2)[0] for path in (tmp_path / "secateur-runs").iterdir())
    assert made == ["tiny-plan", "tiny-prune"]


def test_a_dry_run_writes_nothing(run, model, windows, tmp_path):
    for words in (["score"], ["plan", "--method", "sleb", "--blocks", "2"], ["eval"]):
        code, _, err = run(words[0], model, *words[1:], "--texts", windows, "--dry-run")
        assert code == 0
        assert "needs about" in err
    for words in (["eval", model, "--tasks", "piqa"], ["bench", model]):
        assert run(*words, "--dry-run")[0] == 0
    assert run("prune", model, "--method", "last-n", "--blocks", "2", "--dry-run")[0] == 0
    assert list(tmp_path.iterdir()) == []


def test_a_dry_run_refuses_what_the_job_refuses(run, model):
    for more in ([], ["--dry-run"]):
        code, _, err = run("heal", model, "--with", "lora", "--skeleton", *more)
        assert code == 2
        assert "lora needs the whole model in memory" in err


def test_new_weights_are_counted_before_they_are_made(run, model, windows, monkeypatch):
    words = ("prune", model, "--method", "slicegpt", "--slice", "25%", "--texts", windows)
    code, _, err = run(*words, "--skeleton", "-o", "cut")
    assert code == 0
    assert "GiB of new weights go to" in err
    monkeypatch.setattr(scratch.shutil, "disk_usage", lambda _: SimpleNamespace(free=0))
    code, _, err = run(*words, "--skeleton", "-o", "cut2")
    assert code == 2
    assert "no space left for the new weights" in err


def test_a_cut_that_makes_the_model_larger_is_refused(run, model, windows, tmp_path):
    words = (
        "prune",
        model,
        "--method",
        "slicegpt",
        "--slice",
        "5%",
        "--set",
        "rounding=1",
        "--texts",
        windows,
        "-o",
        "cut",
    )
    code, _, err = run(*words)
    assert code == 2
    assert "more than the" in err
    assert "--remove 20%" in err
    assert not (tmp_path / "cut").exists()
    assert run(*words, "--allow-larger", "--no-check")[0] == 0


def test_a_dry_run_tells_of_the_model_as_the_job_will_hold_it(run, model, windows):
    for words in (["score", model], ["plan", model, "--method", "sleb", "--blocks", "2"], ["eval", model]):
        assert "blocks, in memory, float32 on cpu" in run(*words, "--texts", windows, "--dry-run")[2]
        assert "skeleton, block by block" in run(*words, "--texts", windows, "--dry-run", "--skeleton")[2]


@pytest.mark.parametrize("command", ["methods", "families", "texts"])
def test_lists(run, command):
    code, out, _ = run(command)
    assert code == 0
    code, listed, _ = run(command, "--json")
    for entry in json.loads(listed):
        assert (entry["name"] if isinstance(entry, dict) else entry) in out


def test_inspect_and_version(run, model):
    code, out, _ = run("inspect", model, "--json")
    assert code == 0
    assert json.loads(out)["blocks"] == "8 at model.layers"
    assert run("--version") == (0, "secateur 0.1.0\n", "")
    assert "criterion" in run("methods", "shortened-llama")[1]


BAD = {
    "unknown method": (["plan", "MODEL", "--method", "shortgtp", "--remove", "25%"], "Did you mean 'shortgpt'"),
    "unknown text": (["score", "MODEL", "--texts", "wikitext3"], "wikitext2"),
    "unknown setting": (
        ["plan", "MODEL", "--method", "sleb", "--blocks", "1", "--set", "protect=1"],
        "unknown setting of sleb 'protect'",
    ),
    "bad setting": (
        ["plan", "MODEL", "--method", "sleb", "--blocks", "1", "--set", "protect_last=-1"],
        "protect_last=-1",
    ),
    "setting without value": (["plan", "MODEL", "--method", "sleb", "--blocks", "1", "--set", "x"], "key=value"),
    "a plan and an amount": (
        ["prune", "MODEL", "--plan", "SCORES", "--target-params", "1M", "--set", "x=1"],
        "--target-params, --set: the plan already says how much to remove",
    ),
    "a plan and other windows": (
        ["prune", "MODEL", "--plan", "SCORES", "--windows", "8", "--seed", "1"],
        "--windows, --seed: the plan already says how texts are read",
    ),
    "unknown dtype to save in": (
        ["prune", "MODEL", "--method", "last-n", "--blocks", "1", "--save-dtype", "bf16"],
        "unknown dtype 'bf16'. Did you mean 'bfloat16'",
    ),
    "the folder one is in": (["score", "MODEL", "--texts", "NPY", "-o", "."], "is the current folder"),
    "unknown recipe": (
        ["heal", "MODEL", "--with", "loar"],
        "unknown healing recipe 'loar'. Did you mean 'lora'",
    ),
    "unknown setting of a recipe": (
        ["heal", "MODEL", "--texts", "NPY", "--set", "rnak=4"],
        "unknown setting of heal --with lora 'rnak'. Did you mean 'rank'",
    ),
    "too few tokens": (["heal", "MODEL", "--tokens", "20"], "fewer than two windows"),
    "no number of tokens": (["heal", "MODEL", "--tokens", "many"], "tokens=many: not a number"),
    "remove too large": (["plan", "MODEL", "--method", "last-n", "--remove", "1.5"], "between 0 and 1"),
    "remove zero": (["plan", "MODEL", "--method", "last-n", "--remove", "0%"], "between 0 and 1"),
    "remove unreachable": (["plan", "MODEL", "--method", "last-n", "--remove", "99%"], "unreachable"),
    "remove too small": (["plan", "MODEL", "--method", "last-n", "--remove", "0.1%"], "smallest cut is"),
    "no amount": (["plan", "MODEL", "--method", "last-n"], "no amount given"),
    "two amounts": (["plan", "MODEL", "--method", "last-n", "--remove", "25%", "--blocks", "2"], "several amounts"),
    "too many blocks": (["plan", "MODEL", "--method", "sleb", "--blocks", "7", "--texts", "NPY"], "at most 6"),
    "no such model": (["score", "nowhere/"], "no such folder"),
    "hub offline": (["score", "someone/some-model"], "hub cannot be reached"),
    "no plan and no method": (["prune", "MODEL"], "either --plan FILE, or --method"),
    "missing plan": (["prune", "MODEL", "--plan", "none.json"], "cannot be read"),
    "window too long": (["score", "MODEL", "--seq-len", "4096"], "64"),
    "no windows": (["score", "MODEL", "--windows", "0"], "from 1 up"),
    "bad dtype": (["score", "MODEL", "--dtype", "float12"], "float32, bfloat16, float16"),
    "bad device": (["score", "MODEL", "--device", "gpu"], "device 'gpu'"),
    "unknown score": (["score", "MODEL", "--also", "perplexty"], "Did you mean 'perplexity'"),
    "unknown option": (["score", "MODEL", "--remove", "25%"], "No such option"),
    "unknown task": (["eval", "MODEL", "--tasks", "pica"], "unknown task 'pica'. Near it:"),
    "stability of one model": (["eval", "MODEL", "--tasks", "stdlib-cloze", "--stability"], "name the dense one"),
    "bad batch sizes": (["bench", "MODEL", "--batch-sizes", "1,x"], "whole numbers from 1 up"),
    "prompt too long": (["bench", "MODEL", "--prompts", "400"], "the 64 positions of the model"),
    "a speed-up that is none": (["plan", "MODEL", "--method", "last-n", "--target-speedup", "0.8"], "must be above 1"),
    "memory unreachable": (["plan", "MODEL", "--method", "last-n", "--target-memory", "1kB"], "unreachable"),
    "scores of another model": (
        ["plan", "MODEL", "--method", "uidl", "--blocks", "1", "--texts", "NPY", "--scores", "SCORES"],
        "another model",
    ),
}


@pytest.mark.parametrize("case", list(BAD))
def test_bad_input_is_one_clear_message_and_exit_code_2(case, run, model, windows, tmp_path):
    words, message = BAD[case]
    scores = tmp_path / "other.json"
    scores.write_text(json.dumps({"model": "other", "fingerprint": "0", "texts": None}))
    replaced = {"MODEL": model, "NPY": windows, "SCORES": str(scores)}
    code, out, err = run(*(replaced.get(word, word) for word in words))
    assert code == 2
    assert message in " ".join(err.split())
    assert "Traceback" not in err
    assert out == ""
    assert not (tmp_path / "secateur-runs").exists()


def test_what_one_process_does_is_refused_to_several(run, model, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    code, _, err = run("eval", model)
    assert code == 2
    assert "eval is done by one process" in err


def test_full_memory_of_a_device_is_one_message(run, model, windows, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(ScoreJob, "run", full)
    code, _, err = run("score", model, "--texts", windows)
    assert code == 2
    assert "Use a smaller --batch-size" in err


def test_scores_of_other_texts_are_told(run, model, windows):
    assert run("score", model, "--texts", windows, "-o", "scores")[0] == 0
    words = ["plan", model, "--method", "shortgpt", "--blocks", "1", "--scores", "scores/scores.json"]
    code, _, err = run(*words, "--windows", "2", "--seq-len", "16", "-o", "plan.json")
    assert code == 0
    assert "and are measured anew" in err
    code, _, err = run(*words, "--texts", windows, "-o", "plan.json")
    assert code == 0
    assert "anew" not in err


def test_a_teacher_that_is_another_model_by_now_is_refused(run, tmp_path):
    dense = save_tiny("llama", tmp_path / "dense", tokenizer=True)
    assert run("prune", dense, "--method", "last-n", "--blocks", "2", "--no-check", "-o", "cut")[0] == 0
    save_tiny("llama", dense, seed=5, tokenizer=True)
    code, _, err = run("heal", "cut", "--with", "distill", "-o", "healed")
    assert code == 2
    assert "is no longer the model that cut was pruned from" in err
    code, _, err = run("eval", "cut", "--against", dense, "-o", dense)
    assert code == 2
    assert "was not written by secateur" in err


def test_a_plan_for_another_model_is_refused(run, model, tmp_path):
    other = save_tiny("llama", tmp_path / "other", seed=5, tokenizer=True)
    run("plan", other, "--method", "last-n", "--blocks", "1", "-o", "plan.json")
    code, _, err = run("prune", model, "--plan", "plan.json", "-o", "cut")
    assert code == 2
    assert "another model" in err
    assert not (tmp_path / "cut").exists()


def test_a_plan_never_replaces_another_file(run, model, tmp_path):
    (tmp_path / "notes.json").write_text("{}")
    code, _, err = run("plan", model, "--method", "last-n", "--blocks", "1", "-o", "notes.json")
    assert code == 2
    assert "not a plan" in err
    assert (tmp_path / "notes.json").read_text() == "{}"


def test_no_tokenizer_and_short_text(run, model, tmp_path):
    bare = save_tiny("llama", tmp_path / "bare")
    (tmp_path / "short.txt").write_text("too short")
    assert "no tokenizer" in run("score", bare, "--texts", "python-stdlib")[2]
    code, _, err = run("score", model, "--texts", "short.txt")
    assert code == 2
    assert "too little text" in err
    (tmp_path / "empty.txt").write_text("")
    assert run("score", model, "--texts", "empty.txt")[0] == 2


def test_nan_stops_every_command(run, windows, tmp_path):
    folder = save_tiny("llama", tmp_path / "nan", tokenizer=True)
    damaged = open_model(folder)
    with torch.no_grad():
        damaged.block_list[3].mlp.up_proj.weight[0, 0] = float("nan")
    damaged.module.save_pretrained(folder)
    for words in (["score"], ["plan", "--method", "sleb", "--blocks", "1"], ["eval"]):
        code, _, err = run(words[0], folder, *words[1:], "--texts", windows)
        assert code == 2
        assert "block 3" in err
    code, _, err = run("prune", folder, "--method", "last-n", "--blocks", "1", "-o", "cut")
    assert code == 2
    assert "layers.3.mlp.up_proj" in err
    assert not (tmp_path / "cut").exists()


def test_ctrl_c_is_130_and_keeps_what_was_there(run, model, windows, tmp_path, monkeypatch):
    assert run("score", model, "--texts", windows, "-o", "scores")[0] == 0
    before = (tmp_path / "scores" / "scores.json").read_text()

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(ScoreJob, "run", interrupted)
    assert run("score", model, "--texts", windows, "-o", "scores")[0] == 130
    monkeypatch.setattr(pruning, "draw_scores", interrupted)
    assert run("score", model, "--texts", windows, "-o", "scores")[0] == 130
    assert (tmp_path / "scores" / "scores.json").read_text() == before
    assert [path.name for path in tmp_path.iterdir()] == ["scores"]


def test_a_search_goes_on_after_ctrl_c(run, model, windows, tmp_path, monkeypatch):
    measure, done = trials.mean_loss_of_sources, []

    def interrupted(*given, **named):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(measure(*given, **named))
        return done[-1]

    methods = ["--set", "width=none", "--set", "depth=replaceme,streamline,swm"]
    words = ["plan", model, "--method", "auto", "--remove", "30%", *methods, "--texts", windows]
    monkeypatch.setattr(trials, "mean_loss_of_sources", interrupted)
    code, _, err = run(*words, "-o", "plan.json")
    assert code == 130
    assert "started again with -o plan.json, it resumes" in err
    assert [path.name for path in tmp_path.iterdir()] == ["plan.json.training"]
    monkeypatch.setattr(trials, "mean_loss_of_sources", lambda *a, **n: (done.append(1), measure(*a, **n))[1])
    assert run(*words, "-o", "plan.json")[0] == 0
    assert not (tmp_path / "plan.json.training").exists()
    assert len(done) == len(Plan.read(tmp_path / "plan.json").search.candidates), "each was measured once"


def test_a_full_disk_is_one_clear_message(run, model, windows, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device", "/somewhere")

    monkeypatch.setattr(pruning, "draw_scores", full)
    code, _, err = run("score", model, "--texts", windows, "-o", "scores")
    assert code == 2
    assert "no space left (No space left on device); what was there is kept. Free some space" in err


def test_it_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "secateur", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "secateur 0.1.0\n")


def test_help_comes_without_torch():
    code = "import sys; from secateur.cli.main import app; app(standalone_mode=False); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert done.stdout.endswith("False\n")
    assert all(f" {name} " in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_help_of_its_own(name, run):
    code, out, _ = run(name, "--help")
    assert code == 0
    assert f"secateur {name} " in out
    assert "-h" in out


def test_an_unknown_command(run):
    code, _, err = run("prnue")
    assert code == 2
    assert "Did you mean 'prune'" in err


def test_a_plan_that_merges_is_drawn(run, model, windows, tmp_path):
    words = ["plan", model, "--method", "swm", "--blocks", "2", "--texts", windows, "-o", "plans/plan.json"]
    code, out, err = run(*words)
    assert code == 0
    assert "merges" in out
    assert "windows.png" in err
    assert (tmp_path / "plans" / "windows.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in (tmp_path / "plans").iterdir()} == {"plan.json", "windows.png"}


def test_a_picture_that_cannot_be_drawn_is_said(run, model, tmp_path):
    np.save(tmp_path / "short.npy", np.array([[5, 6, 7]]))
    code, _, err = run("plan", model, "--method", "swm", "--blocks", "2", "--texts", "short.npy", "-o", "plan.json")
    assert code == 0
    assert "no plot of the windows: CKA needs at least 4 tokens" in err
    assert not (tmp_path / "windows.png").exists()
    assert Plan.read("plan.json").steps[0].windows


def test_compare_says_what_it_would_do_and_finds_mistakes_first(run, model, windows):
    code, _, err = run(
        "compare", model, "--methods", "sleb,swm:0.5+slicegpt:0.5", "--remove", "10%,20%", "--heal", "none,lora",
        "--set", "sleb.protect_last=2", "--texts", windows, "--dry-run",
    )  # fmt: skip
    assert code == 0
    assert "8 cells: sleb-protect_last=2-10, sleb-protect_last=2-10-lora" in err
    assert "swm+slicegpt-20-lora" in err
    for words, message in (
        (["--methods", "slebb", "--remove", "10%"], "Did you mean 'sleb'"),
        (["--methods", "sleb", "--remove", "ten"], "remove=ten"),
        (["--methods", "sleb", "--remove", "10%", "--set", "rule=mean"], "sleb.rule"),
        (["--methods", "sleb", "--remove", "10%", "--set", "swm.rule=mean"], "unknown method of this study 'swm'"),
        (["--methods", "sleb", "--remove", "10%", "--on", "moon"], "unknown engine 'moon'"),
        (["--methods", "sleb", "--remove", "10%", "--stability"], "name some, such as stdlib-cloze"),
    ):
        code, _, err = run("compare", model, *words, "--dry-run")
        assert code == 2
        assert message in err


def test_a_recipe_is_run_and_gone_on_with(run, model, windows, tmp_path):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"model: {model}\ntexts: {windows}\nwindows: all\ncheck: false\n"
        "prune: {method: last-n, blocks: 2}\neval: {windows: all}\n"
    )
    code, out, err = run("run", recipe, "-o", "done", "--json")
    assert code == 0
    assert "prune …" in err
    (outcome,) = json.loads(out)
    assert outcome["perplexity"] > 1
    code, out, err = run("run", recipe, "-o", "done")
    assert code == 0
    assert "prune …" not in err
    assert f"{outcome['perplexity']:.3f}" in out
    recipe.write_text(recipe.read_text().replace("last-n", "last-m"))
    code, _, err = run("run", recipe, "-o", "done")
    assert code == 2
    assert "Did you mean 'last-n'" in err


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--method", "obs-width", "--gate", "probes:0.9"), "obs-width makes one plan"),
        (("--method", "auto", "--gate", "probes:1.9"), "the share to be kept is a number above 0, up to 1"),
        (("--method", "auto", "--gate", "gsm8k"), "'gsm8k' is no probe"),
        (("--method", "auto", "--gate", "probes", "--set", "gate=probes"), "give one of them"),
    ],
)
@pytest.mark.parametrize("command", ["plan", "prune"])
def test_a_gate_that_cannot_be(run, tiny_with_tokenizer, window_file, tmp_path, command, words, says):
    code, out, said = run(command, tiny_with_tokenizer, "--remove", "20%", "--texts", window_file, *words)
    assert (code, out) == (2, "")
    assert says in said
    assert not list(tmp_path.rglob("plan.json"))


def test_a_gate_beside_a_plan_is_refused(run, tiny_with_tokenizer):
    code, _, said = run("prune", tiny_with_tokenizer, "--plan", "plan.json", "--gate", "probes:0.9")
    assert (code, said.startswith("error: --gate: the plan already says")) == (2, True)


def test_compare_refuses_a_gate_of_what_the_dense_model_cannot_do(run, tiny_with_tokenizer, window_file, tmp_path):
    words = ("--methods", "shortgpt", "--remove", "10%", "--texts", window_file, "--limit", "6", "-o", "study")
    for _ in range(2):  # started again, it says the same
        code, _, said = run("compare", tiny_with_tokenizer, *words, "--gate", "probe-format:0.8")
        assert code == 2
        assert "the dense model itself can do none of its probes (probe-format 0.00 (floor 0.00))" in said
    assert "gate: probe-format:0.8" in (tmp_path / "study" / "recipe.yaml").read_text()
    code, _, said = run("compare", tiny_with_tokenizer, *words, "--gate", "gsm8k")
    assert (code, "'gsm8k' is no probe" in said) == (2, True)
    code, _, said = run("report", "study", "--gate", "probe-copy")
    assert (code, "probe-copy not measured on the dense model" in said) == (2, True)


def test_eval_says_when_a_model_is_beyond_use(run, tmp_path):
    made = ("prune", "bundled", "--method", "last-n", "--no-check", "-o")
    asked = ("--against", "bundled", "--texts", "python-stdlib", "--windows", "2", "--seq-len", "64")
    assert run(*made, "ruin", "--blocks", "8")[0] == run(*made, "fine", "--blocks", "1")[0] == 0
    code, out, said = run("eval", "ruin", *asked, "--json")
    assert (code, len(json.loads(out))) == (0, 2)
    assert "This model is beyond use as it is: it predicts text far worse than before (×" in said
    assert "beyond use" not in run("eval", "fine", *asked)[2]
