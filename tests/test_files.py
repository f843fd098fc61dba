"""Atomic exchange, recovery, litter of dead processes, locks, signals, and files that are no files."""

import json
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from secateur import claims, files, ownership
from secateur.errors import InputError
from secateur.files import is_full_disk, new_part, put_in_place, recover, replace_file
from secateur.interruption import ending_as_ctrl_c
from secateur.ownership import owned_name, remove_litter, scratch, scratch_folder
from secateur.reading import FileKind, from_json

SOURCE = Path(files.__file__).parents[1]


def process(script, **more):
    """Start Python with this script, and wait for its first line."""
    code = textwrap.dedent(script)
    environment = os.environ | {"PYTHONPATH": str(SOURCE)}
    started = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment, **more)
    assert started.stdout.readline().strip() == "ready"
    return started


def name_of_the_dead(stem, kind):
    """A name whose owner has just ended."""
    with subprocess.Popen([sys.executable, "-c", ""]) as ended:
        number, began = ended.pid, int(time.time())
    return f"{stem}.{ownership._machine()}-{number}-{began}.abc123.{kind}"


def make(folder, **texts):
    folder.mkdir()
    for name, text in texts.items():
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize("exchanges", [True, False])
def test_a_target_is_replaced_and_nothing_else_is_left(tmp_path, monkeypatch, exchanges):
    if not exchanges:
        monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    target = make(tmp_path / "cut", old="1")
    part = new_part(target)
    (part / "new").write_text("2")
    put_in_place(part, target)
    assert [file.name for file in target.iterdir()] == ["new"]
    assert list(tmp_path.iterdir()) == [target]
    assert target.stat().st_mode & 0o777 == 0o777 & ~files.umask()


@pytest.mark.skipif(sys.platform != "linux", reason="renameat2 is Linux's")
def test_linux_exchanges_in_one_step(tmp_path):
    one, other = make(tmp_path / "one", a=""), make(tmp_path / "other", b="")
    assert files._exchanged(one, other)
    assert (one / "b").exists()
    assert (other / "a").exists()
    with pytest.raises(OSError, match="No such file"):
        files._exchanged(one, tmp_path / "none")


def test_a_kill_between_two_renames_is_recovered(tmp_path, monkeypatch):
    target = make(tmp_path / "cut", old="1")
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    target.rename(tmp_path / name_of_the_dead(".cut", "old"))
    make(tmp_path / name_of_the_dead(".cut", "part"), new="2")
    recover(target)
    assert [file.name for file in target.iterdir()] == ["old"]
    assert list(tmp_path.iterdir()) == [target]


def test_a_rename_that_fails_leaves_the_target(tmp_path, monkeypatch):
    target, rename = make(tmp_path / "cut", old="1"), Path.rename

    def failing(self, new):
        if self.suffix == ".part":
            raise OSError(5, "Input/output error")
        return rename(self, new)

    part = new_part(target)
    monkeypatch.setattr(files, "_exchanged", lambda *_: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="Input/output error"):
        put_in_place(part, target)
    assert [file.name for file in target.iterdir()] == ["old"]


def test_litter_is_that_of_the_dead(tmp_path):
    ours = tmp_path / owned_name(".cut", "part")
    ours.mkdir()
    make(tmp_path / name_of_the_dead(".cut", "part"), file="")
    (tmp_path / name_of_the_dead(".cut", "tmp")).write_text("")
    (tmp_path / ".cut.12345.part").mkdir()
    other = tmp_path / name_of_the_dead(".other", "tmp")
    other.write_text("")
    foreign = tmp_path / ownership.owned_name(".cut", "part").replace(ownership._machine(), "00000000")
    foreign.mkdir()
    remove_litter(tmp_path, ".cut.")
    assert set(tmp_path.iterdir()) == {ours, tmp_path / ".cut.12345.part", other, foreign}
    os.utime(foreign, (0, 0))
    remove_litter(tmp_path, ".cut.", "part")
    assert not foreign.exists()
    remove_litter(tmp_path / "nowhere", ".cut.")


def test_a_number_that_was_given_again_does_not_keep_litter():
    assert ownership.is_alive(os.getpid(), ownership._started(os.getpid()))
    assert not ownership.is_alive(os.getpid(), ownership._started(os.getpid()) - 60)


def test_scratch_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(ownership.tempfile, "gettempdir", lambda: str(tmp_path))
    ownership._clear_once.cache_clear()
    make(tmp_path / name_of_the_dead("secateur-states", "tmp"), file="")

    class Owner:
        pass

    owner = Owner()
    folder = scratch_folder("states", owner)
    assert list(tmp_path.iterdir()) == [folder]
    del owner
    with scratch("check") as place:
        assert [one.name for one in tmp_path.iterdir()] == [place.name]
    assert list(tmp_path.iterdir()) == []
    ownership._clear_once.cache_clear()


def test_the_second_of_two_commands_is_told_who_holds_the_target(tmp_path):
    target = tmp_path / "new" / "cut"
    holder = process(
        f"""
        import sys, time
        from pathlib import Path
        from secateur.claims import claimed
        sys.argv = ["secateur", "heal"]
        with claimed(Path({str(target)!r})):
            print("ready", flush=True)
            time.sleep(60)
        """
    )
    with (
        pytest.raises(InputError, match=rf"`secateur heal`, process {holder.pid} on .* is writing it"),
        claims.claimed(target),
    ):
        pass
    holder.kill()
    holder.wait()
    with claims.claimed(target):
        assert (tmp_path / "new" / ".cut.lock").exists()
    assert not (tmp_path / "new" / ".cut.lock").exists()
    holder.stdout.close()


def test_folders_made_for_a_claim_go_with_it(tmp_path):
    with claims.claimed(tmp_path / "a" / "b" / "cut"):
        assert (tmp_path / "a" / "b").is_dir()
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot be written"), claims.claimed(tmp_path / "file" / "cut"):
        pass
    claims.claim(tmp_path / "file" / "cut")  # outside a command, nothing is held


def test_claims_of_a_command_end_with_it(tmp_path):
    with claims.holding_claims():
        claims.claim(tmp_path / "cut")
        with pytest.raises(InputError, match="is writing it"):
            claims.claim(tmp_path / "cut")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_block_as_ctrl_c_does(number):
    before = signal.getsignal(number)
    with ending_as_ctrl_c() as came, pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
    assert came == [number]
    assert signal.getsignal(number) == before


def test_children_end_with_their_parent(tmp_path):
    """The parent is killed; the child, in a session of its own, reads the end of its pipe."""
    script = "from secateur.interruption import end_with_parent; end_with_parent(); import time; time.sleep(60)"
    parent = process(
        f"""
        import subprocess, sys, time
        child = subprocess.Popen([sys.executable, "-c", {script!r}], stdin=subprocess.PIPE, start_new_session=True)
        open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
        print("ready", flush=True)
        time.sleep(60)
        """
    )
    child = int((tmp_path / "pid").read_text())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    for _ in range(200):
        if ownership._started(child) is None:
            return
        time.sleep(0.05)
    os.kill(child, signal.SIGKILL)
    pytest.fail("the child is still there")


def test_a_full_disk_is_known_by_its_error_or_by_what_libraries_quote():
    assert is_full_disk(OSError(28, "No space left on device"))
    assert is_full_disk(OSError(27, "File too large"))
    assert is_full_disk(RuntimeError("I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("writing failed")
    wrapped.__cause__ = OSError(28, "No space left on device")
    assert is_full_disk(wrapped)
    assert not is_full_disk(OSError(13, "Permission denied"))
    assert not is_full_disk(None)


def test_a_file_that_cannot_be_written_leaves_nothing(tmp_path):
    (tmp_path / "taken").mkdir()
    with pytest.raises(InputError, match="cannot be written"):
        replace_file(tmp_path / "taken", "text")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]
    (tmp_path / name_of_the_dead(".state.json", "tmp")).write_text("")
    replace_file(tmp_path / "state.json", "{}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["state.json", "taken"]


KIND = FileKind("plan", 100, advice="Make a new one.")


def fifo(path):
    os.mkfifo(path)


@pytest.mark.parametrize(
    ("write", "says"),
    [
        (fifo, "not an ordinary file"),
        (lambda path: path.symlink_to("/dev/zero"), "not an ordinary file"),
        (lambda path: path.mkdir(), "the plan cannot be read"),
        (lambda path: path.write_text("[" + "1," * 100 + "1]"), "MiB are read"),
        (lambda path: path.write_bytes(b"\xff\xfe{"), "not text. Make a new one."),
        (lambda path: path.write_text("{"), "not a valid plan: Expecting"),
        (lambda path: path.write_text("1" * 30), "too large a number"),
        (lambda path: path.write_text('"\\ud800"'), "lone surrogate"),
        (lambda path: path.write_text("[" * 99), "not a valid plan"),
        (lambda path: None, "No such file"),
    ],
)
def test_what_is_no_plain_file_of_its_kind_is_one_message(tmp_path, write, says):
    path = tmp_path / "plan.json"
    write(path)
    with pytest.raises(InputError) as caught:
        KIND.json(path)
    assert says in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")


def test_whatever_a_parser_raises_is_one_message(tmp_path):
    path = tmp_path / "plan.json"
    path.write_text("{}")
    with pytest.raises(InputError, match=r"not a valid plan: 'steps' is missing\. Make a new one\."):
        KIND.parsed(path, lambda text: json.loads(text)["steps"])
    with pytest.raises(InputError, match="nested too deeply"):
        FileKind("plan", 1 << 20).parsed_text(path, "[" * 100_000, from_json)
    assert from_json('["\\ud83d\\ude00", 9223372036854775807]') == ["\U0001f600", (1 << 63) - 1]
