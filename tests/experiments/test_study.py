"""Studies: the cells, the queue here and on Ray, what is shared, what is skipped, and cells that fail or die."""

import json
import os
import sys
import time

import pytest

import secateur
from secateur.errors import InputError
from secateur.experiments import queue
from secateur.experiments.grid import rows_of, study_of
from secateur.experiments.queue import CellGroup, run_group
from secateur.experiments.state import CELLS, State
from secateur.experiments.study import Queue


def grid(methods, remove=("10%",), heal=(), **settings):
    return study_of("m", list(methods), list(remove), list(heal), settings)


def names(study):
    return [[cell.name for cell in row] for row in rows_of(study)]


def test_cells_that_share_a_cut_stand_together():
    heal = ["none", {"with": "lora", "tokens": "1M"}]
    study = grid(["sleb", {"method": "swm", "settings": {"rule": "mean"}}], ["10%", 0.125], heal)
    assert names(study) == [
        ["sleb-10", "sleb-10-lora"],
        ["sleb-12.5", "sleb-12.5-lora"],
        ["swm-rule=mean-10", "swm-rule=mean-10-lora"],
        ["swm-rule=mean-12.5", "swm-rule=mean-12.5-lora"],
    ]
    assert rows_of(study)[0][0].recipe.heal is None


def test_names_are_folders_and_unique():
    study = grid(["swm:0.5,slicegpt:0.5", {"method": "sleb", "name": "a/b"}, "sleb", "sleb"])
    assert names(study) == [["swm+slicegpt-10"], ["a_b-10"], ["sleb-10"], ["sleb-10-2"]]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (lambda: grid(["slebb"]), "Did you mean 'sleb'"),
        (lambda: grid([{"method": "sleb", "settings": {"rule": 1}}]), "unknown setting of sleb 'rule'"),
        (lambda: grid(["sleb"], ["110%"]), "remove=110%"),
        (lambda: grid(["sleb"], heal=[{"with": "lorra"}]), "Did you mean 'lora'"),
        (lambda: grid(["sleb"], heal=[{"with": "lora", "settings": {"rang": 1}}]), "unknown setting of heal"),
        (lambda: grid(["sleb"], evall={}), "Did you mean 'eval'"),
    ],
)
def test_mistakes_are_found_before_anything_is_done(asked, message):
    with pytest.raises(InputError) as caught:
        rows_of(asked())
    assert message in str(caught.value)


@pytest.fixture(scope="module")
def study(tiny_with_tokenizer, window_file, tmp_path_factory):
    """Run a study of a cell, the same healed, and one that cannot be; gives how to run it again, and its folder."""
    folder = tmp_path_factory.mktemp("study") / "study"

    def again(**changes):
        told = []
        cells = secateur.compare(
            tiny_with_tokenizer,
            **{
                "methods": ["last-n", {"method": "shortened-llama", "settings": {"criterion": "magnitude"}}],
                "remove": ["40%"],
                "heal": ["none", {"with": "full", "tokens": 64, "seq_len": 16, "settings": {"batch_size": 2}}],
                "texts": window_file,
                "windows": "all",
                "eval": {"windows": "all"},
                "check": False,
                "dtype": "float32",
                "out": folder,
                "finished": lambda cell: told.append(cell.name),
                "queue": Queue(workers=2),
            }
            | changes,
        )
        return cells, told

    return again, again(), folder


def test_every_cell_comes_to_an_end(study):
    _, (cells, told), folder = study
    assert [cell.name for cell in cells] == [
        "last-n-40",
        "last-n-40-full",
        "shortened-llama-criterion=magnitude-40",
        "shortened-llama-criterion=magnitude-40-full",
    ]
    assert sorted(told) == sorted(cell.name for cell in cells)
    plain, healed, failed, also_failed = cells
    assert plain.failed is None
    assert healed.failed is None
    assert plain.removed == healed.removed == pytest.approx(0.4, abs=0.05)
    assert plain.perplexity != healed.perplexity
    assert failed.failed["kind"] == also_failed.failed["kind"] == "InputError"
    assert (folder / "dense" / "results.jsonl").is_file()


def test_a_healed_cell_takes_over_the_cut(study):
    _, _, folder = study
    healed = folder / CELLS / "last-n-40-full"
    assert State.of(healed).stages["prune"]["cut"] == "../last-n-40/cut"
    assert not (healed / "cut").exists()
    history = json.loads((healed / "healed" / "secateur.json").read_text())["history"]
    assert [set(entry) & {"plan", "healing"} for entry in history] == [{"plan"}, {"healing"}]


def test_a_cell_is_measured_like_a_run_of_its_own(study, window_file):
    _, (cells, _), folder = study
    cut = secateur.open_model(folder / CELLS / "last-n-40" / "cut")
    assert cells[0].perplexity == pytest.approx(secateur.evaluate(cut, texts=window_file, windows=None)[0].value)
    (dense,) = [json.loads(line) for line in (folder / "dense" / "results.jsonl").read_text().splitlines()]
    (own,) = [json.loads(line) for line in (folder / CELLS / "last-n-40" / "results.jsonl").read_text().splitlines()]
    assert (dense["role"], own["role"]) == ("against", "model")
    assert dense["texts"]["fingerprint"] == own["texts"]["fingerprint"]


def test_again_only_failed_and_new_cells_run_and_ray_runs_them(study):
    pytest.importorskip("ray")
    again, (before, _), folder = study
    (folder / CELLS / "last-n-40" / "results.jsonl").touch()
    stamp = (folder / CELLS / "last-n-40" / "plan.json").stat().st_mtime_ns
    cells, told = again(
        methods=["last-n"], remove=["40%", "25%"], heal=(), queue=Queue(on="ray", keep=False, workers=2)
    )
    assert told == ["last-n-25"]
    assert cells[0].perplexity == before[0].perplexity
    assert [cell.failed for cell in cells] == [None] * 2
    assert (folder / CELLS / "last-n-40" / "plan.json").stat().st_mtime_ns == stamp
    assert not (folder / CELLS / "last-n-25" / "cut").exists()


def test_a_folder_of_another_command_is_refused(study):
    again, _, folder = study
    with pytest.raises(InputError, match="holds what `secateur run` wrote"):
        again(out=folder / CELLS / "last-n-40")
    with pytest.raises(InputError, match="workers 0"):
        again(queue=Queue(workers=0))


def test_what_kills_a_cell_is_noted_and_the_next_one_runs(tmp_path, monkeypatch):
    """The process dies at the cell `b`; `c` is begun by another one."""
    for name in "abc":
        (tmp_path / CELLS / name).mkdir(parents=True)
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\nimport os, sys\n"
        "for name in (word for word in sys.argv[4:] if len(word) == 1):\n"
        '    if name == "b": os.kill(os.getpid(), 9)\n'
        f'    print("{queue.DONE}", name, flush=True)\n'
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))
    run_group(CellGroup(tmp_path, "a", ("a", "b", "c")), {})
    assert "SIGKILL; was there too little memory" in State.of(tmp_path / CELLS / "b").failed["error"]
    assert [State.of(tmp_path / CELLS / name).failed for name in "ac"] == [None, None]


def test_stopping_a_study_ends_its_processes_and_is_no_failure(tmp_path, monkeypatch):
    for name in "ab":
        (tmp_path / CELLS / name).mkdir(parents=True)
    begun = tmp_path / "begun"
    stand_in = tmp_path / "python"
    stand_in.write_text(
        f"#!{sys.executable}\nimport os, time\n"
        f"open({str(begun)!r}, 'a').write(str(os.getpid()) + ' ')\ntime.sleep(60)\n"
    )
    stand_in.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(stand_in))

    def interrupted(_):
        while not begun.exists() or not begun.read_text().endswith(" "):
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(queue, "as_completed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(queue.run_groups([CellGroup(tmp_path, "a", ("a", "b"))], 1))
    (only,) = map(int, begun.read_text().split())
    with pytest.raises(ProcessLookupError):
        os.kill(only, 0)
    assert [State.of(tmp_path / CELLS / name).failed for name in "ab"] == [None, None]


def test_workers_get_the_devices_that_were_given(monkeypatch):
    monkeypatch.setattr(queue.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-7")
    assert [queue._environment(number, 2)["CUDA_VISIBLE_DEVICES"] for number in (0, 1)] == ["2", "GPU-7"]
    assert (queue.default_workers("auto"), queue.default_workers("cuda:1"), queue.default_workers("cpu")) == (2, 1, 1)
    assert queue._environment(0, 1) == {}
    assert "CUDA_VISIBLE_DEVICES" not in queue._environment(1, 2, "cuda:1")
