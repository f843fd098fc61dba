"""What is left when a command is stopped: by a signal, by a full disk, or because another one holds its target."""

import contextlib
import json
import os
import resource
import shutil
import signal
import subprocess

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException

from secateur import claims
from secateur.calibration import store
from secateur.cli import prune as pruning
from secateur.jobs.score import ScoreJob
from secateur.models import forward
from secateur.training import run_folder


@pytest.fixture
def run(run):
    """Run a command line as for all commands; gives exit code and stderr."""
    return lambda *words: run(*words)[::2]


@pytest.fixture
def heal(run, tiny_with_tokenizer, window_file):
    """Heal with a state saved after every step."""
    words = ["heal", tiny_with_tokenizer, "--texts", window_file, "--no-check"]
    return lambda out="healed": run(
        *words, "-o", out, "--set", "batch_size=2", "--set", "save_minutes=0.0001", "--set", "evaluations=1"
    )


@contextlib.contextmanager
def files_up_to(size):
    """Within the block no file may grow beyond this size, as if the disk were full then."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files_in(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize(("number", "expected"), [("SIGTERM", 143), ("SIGHUP", 129), ("SIGINT", 130)])
def test_signals_end_as_ctrl_c_does(run, tiny_with_tokenizer, window_file, tmp_path, monkeypatch, number, expected):
    monkeypatch.setattr(ScoreJob, "run", lambda _: signal.raise_signal(getattr(signal, number)))
    code, err = run("score", tiny_with_tokenizer, "--texts", window_file, "-o", "scores")
    assert code == expected
    assert "Traceback" not in err
    assert list(tmp_path.iterdir()) == []


def test_what_fails_in_cleaning_up_after_ctrl_c_is_no_traceback(run, tiny_with_tokenizer, window_file, monkeypatch):
    def stopped(_):
        try:
            raise KeyboardInterrupt
        finally:
            raise AttributeError("not there yet")

    monkeypatch.setattr(ScoreJob, "run", stopped)
    assert run("score", tiny_with_tokenizer, "--texts", window_file, "-o", "scores")[0] == 130


def test_blocks_have_their_own_forward_again_wherever_it_is_interrupted(tiny):
    blocks = tiny("llama").block_list

    def stopped(index):
        if index == 2:
            raise KeyboardInterrupt
        return lambda *_: None

    with pytest.raises(KeyboardInterrupt), forward._forwards(blocks, stopped):
        pass
    assert not any("forward" in vars(block) for block in blocks)


@pytest.mark.parametrize("wrapped", [True, False])
def test_ctrl_c_while_a_state_is_saved(heal, tmp_path, monkeypatch, wrapped):
    """The library wraps what stops it into an exception that no `except Exception` sees."""
    save, saved = run_folder.dcp.save, []

    def stopped(tensors, checkpoint_id, **more):
        save(tensors, checkpoint_id=checkpoint_id, **more)
        saved.append(checkpoint_id)
        if len(saved) == 3:
            error = KeyboardInterrupt()
            raise CheckpointException("save", {0: (error, None)}) if wrapped else error

    monkeypatch.setattr(run_folder.dcp, "save", stopped)
    code, err = heal()
    assert code == 130
    assert "Traceback" not in err
    monkeypatch.undo()
    os.chdir(tmp_path)
    assert not list((tmp_path / "healed.training").glob("*.part"))
    assert heal()[0] == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["healed"]


def test_a_disk_that_is_full_while_a_state_is_saved(heal, tmp_path):
    before = _after_two_states(heal, tmp_path)
    with files_up_to(20_000):
        code, err = heal()
    assert code == 2
    assert "the state of the training cannot be written" in err
    assert "Traceback" not in err
    assert {path: content for path, content in files_in(tmp_path).items() if "state-" in str(path)} == before
    assert heal()[0] == 0


def _after_two_states(heal, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        save, saved = run_folder.dcp.save, []

        def stopped(*given, **named):
            if len(saved) == 3:
                raise KeyboardInterrupt
            saved.append(save(*given, **named))

        patch.setattr(run_folder.dcp, "save", stopped)
        assert heal()[0] == 130
    found = {path: content for path, content in files_in(tmp_path).items() if "state-" in str(path)}
    assert found
    return found


@pytest.mark.parametrize("size", [0, 4_000, 100_000])
def test_a_disk_that_is_full_leaves_the_earlier_result(run, tiny_with_tokenizer, tmp_path, size):
    words = ["prune", tiny_with_tokenizer, "--method", "last-n", "--no-check", "-o", "cut"]
    assert run(*words, "--blocks", "1")[0] == 0
    before = files_in(tmp_path)
    with files_up_to(size):
        code, err = run(*words, "--blocks", "2")
    assert code == 2
    assert "Traceback" not in err
    assert files_in(tmp_path) == before


@pytest.mark.parametrize("command", ["prune", "heal", "score", "plan"])
@pytest.mark.parametrize("kilobytes", [8, 40, 120])
def test_a_real_small_disk(run, heal, small_disk, tiny_with_tokenizer, window_file, command, kilobytes):
    small_disk(kilobytes)
    method = ["--method", "last-n", "--blocks", "1"]
    if command == "heal":
        code, err = heal(out="disk/healed")
    else:
        more = {"prune": [*method, "--no-check"], "plan": method, "score": ["--texts", window_file]}[command]
        code, err = run(command, tiny_with_tokenizer, *more, "-o", "disk/out")
    assert code == 2 or (code == 0 and command == "plan")
    assert "Traceback" not in err
    assert code == 0 or "pace" in err, "it says that there is no space"


@pytest.fixture
def small_disk(tmp_path):
    """Mount a disk of some kilobytes at `disk`, where that is allowed."""
    disk = tmp_path / "disk"

    def mount(kilobytes):
        disk.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "none", str(disk)]
        if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip("no disk can be mounted here")

    yield mount
    subprocess.run(["umount", "-l", str(disk)], capture_output=True, check=False)


def test_hidden_states_that_find_no_room(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "scratch_folder", lambda _: tmp_path)
    monkeypatch.setattr(store, "require_room", lambda *_: None)
    kept = store.StateStore(budget=0)
    with files_up_to(1_000), pytest.raises(OSError, match="no space left for hidden states"):
        kept.put("state", torch.zeros(1_000))


def test_edited_weights_that_find_no_room(run, tiny_with_tokenizer, window_file, tmp_path):
    words = ["prune", tiny_with_tokenizer, "--skeleton", "--method", "obs-width", "--remove", "20%", "-o", "cut"]
    with files_up_to(4_000):
        code, err = run(*words, "--texts", window_file, "--no-check")
    assert code == 2
    assert "Traceback" not in err
    assert "Free some space" in err
    assert list(tmp_path.iterdir()) == []


def test_the_second_of_two_commands_stops(run, tiny_with_tokenizer, window_file, tmp_path):
    words = ["prune", tiny_with_tokenizer, "--method", "last-n", "--blocks", "1", "--no-check", "-o", "cut"]
    with claims.claimed(tmp_path / "cut"):
        code, err = run(*words)
        assert code == 2
        assert "is writing it; wait until it has ended" in err
        assert run(*words, "--dry-run")[0] == 0
    assert run(*words)[0] == 0
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {tiny_with_tokenizer}\ntexts: {window_file}\nprune: {{method: last-n, blocks: 1}}\n")
    with claims.claimed(tmp_path / "study"):
        code, err = run("run", recipe, "-o", "study")
    assert code == 2
    assert "is writing it" in err


@pytest.mark.parametrize("command", ["score", "plan", "prune"])
def test_a_target_that_cannot_be_written_is_found_before_anything_is_measured(
    run, tiny_with_tokenizer, window_file, tmp_path, monkeypatch, command
):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(pruning, "opened", None)
    method = [] if command == "score" else ["--method", "last-n", "--blocks", "1"]
    code, err = run(command, tiny_with_tokenizer, *method, "--texts", window_file, "-o", "file/below/out")
    assert code == 2
    assert "file" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(run, tiny_with_tokenizer, window_file, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, err = run("score", tiny_with_tokenizer, "--texts", window_file, "-o", "locked/scores")
    assert code == 2
    assert "allows no new files" in err


def test_memory_that_cannot_be_had_is_one_message(run, tiny_with_tokenizer, window_file, monkeypatch):
    monkeypatch.setattr(ScoreJob, "run", lambda _: np.empty(1 << 60, dtype=np.int8))
    code, err = run("score", tiny_with_tokenizer, "--texts", window_file, "-o", "scores")
    assert code == 2
    assert "not enough memory" in err


def test_a_log_torn_by_a_kill_is_read_up_to_there(tmp_path):
    folder = run_folder.RunFolder(tmp_path / "run", {"seed": 0})
    folder.log({"step": 1})
    with (tmp_path / "run" / "log.jsonl").open("a") as file:
        file.write('{"step": 2, "lo')
    assert folder.log_entries() == [{"step": 1}]
    folder.forget_after(1)
    assert json.loads((tmp_path / "run" / "log.jsonl").read_text()) == {"step": 1}
