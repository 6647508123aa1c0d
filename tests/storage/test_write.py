import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from storage import faults
from storage.faults import NEW, OLD, content, fill_new, make_old
from veneer.storage import write
from veneer.storage.write import write_file, write_folder

# file by file, each file is old or new; otherwise the folder is
MIXTURE = {name: {OLD[name], NEW[name]} for name in OLD}


@pytest.fixture
def folder(tmp_path):
    make_old(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_a_new_folder_and_its_parents(tmp_path):
    write_folder(tmp_path / "a" / "b", fill_new)
    assert content(tmp_path / "a" / "b") == {name: NEW[name] for name in NEW if name != "notes.txt"}
    assert [entry.name for entry in (tmp_path / "a").iterdir()] == ["b"]


@pytest.mark.parametrize("mode", faults.MODES)
def test_new_files_replace_old_ones_and_others_stay(folder, mode):
    (folder / "checkpoint").mkdir()
    (folder / "checkpoint" / "state.bin").write_bytes(b"x" * 10)
    (folder / "link").symlink_to("notes.txt")
    (folder / "dangling").symlink_to("gone")
    with faults.mode(mode):
        write_folder(folder, fill_new)
    assert (folder / "checkpoint" / "state.bin").read_bytes() == b"x" * 10
    assert os.readlink(folder / "link") == "notes.txt"
    assert os.readlink(folder / "dangling") == "gone"
    for entry in ("link", "dangling", "checkpoint/state.bin"):
        (folder / entry).unlink()
    (folder / "checkpoint").rmdir()
    assert content(folder) == NEW
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("mode", faults.MODES)
def test_what_another_process_writes_meanwhile_stays(folder, mode, monkeypatch):
    flush = write._sync_all

    def flush_while_another_writes(paths):
        flush(paths)
        (folder / "rng_state_1.pth").write_bytes(b"late")

    monkeypatch.setattr(write, "_sync_all", flush_while_another_writes)
    with faults.mode(mode):
        write_folder(folder, fill_new)
    assert (folder / "rng_state_1.pth").read_bytes() == b"late"
    (folder / "rng_state_1.pth").unlink()
    assert content(folder) == NEW
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


def test_another_process_may_make_the_folder_meanwhile(tmp_path, monkeypatch):
    folder, flush, exists = tmp_path / "new", write._sync_all, Path.exists

    def flush_while_another_writes(paths):
        flush(paths)
        folder.mkdir()
        (folder / "rng_state_1.pth").write_bytes(b"late")
        # it is made after the look for it, and before the rename
        answers = iter([False])
        monkeypatch.setattr(Path, "exists", lambda path: next(answers, True) if path == folder else exists(path))

    monkeypatch.setattr(write, "_sync_all", flush_while_another_writes)
    write_folder(folder, fill_new)
    monkeypatch.undo()
    assert (folder / "rng_state_1.pth").read_bytes() == b"late"
    assert {name for name in NEW if name != "notes.txt"} < {entry.name for entry in folder.iterdir()}


@pytest.mark.parametrize("mode", faults.MODES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_if_filling_fails_nothing_has_changed(folder, mode, error):
    def fail(stage):
        fill_new(stage)
        raise error

    with faults.mode(mode), pytest.raises(error):
        write_folder(folder, fail)
    assert content(folder) == OLD
    assert [entry.name for entry in folder.parent.iterdir()] == ["adapter"]


@pytest.mark.parametrize("mode", faults.MODES)
@pytest.mark.parametrize("error", [OSError(errno.EIO, "I/O error"), KeyboardInterrupt()], ids=["OSError", "interrupt"])
def test_a_fault_at_any_step_leaves_the_old_files_or_the_new(tmp_path, mode, error):
    def fail():
        raise error

    for n in range(1, 300):
        folder = tmp_path / str(n) / "adapter"
        make_old(folder)
        raised = False
        with faults.mode(mode), faults.at_step(n, fail) as steps:
            try:
                write_folder(folder, fill_new)
            except (OSError, KeyboardInterrupt):
                raised = True
        found = content(folder)
        if mode == "in place":
            found = {name: text for name, text in found.items() if name in OLD}
            assert set(found) == set(OLD), (n, steps)
            assert all(text in MIXTURE[name] for name, text in found.items()), (n, steps)
        else:
            assert found in (OLD, NEW), (n, steps)
        if not raised and mode != "in place":
            assert found == NEW, (n, steps)
        write_folder(folder, fill_new)
        if len(steps) < n:
            break
    else:
        pytest.fail("it never ended")
    assert n > 15


@pytest.fixture(scope="module")
def deaths(tmp_path_factory):
    place = tmp_path_factory.mktemp("deaths")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(
        [sys.executable, faults.__file__, str(place)], capture_output=True, text=True, timeout=120, env=environment
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("mode", faults.MODES)
def test_a_death_at_any_step_leaves_the_old_files_or_the_new(deaths, mode):
    runs = deaths[mode]
    assert len(runs) > 15
    assert [run["died"] for run in runs] == [True] * (len(runs) - 1) + [False]
    for run in runs:
        after = run["after"]
        if mode == "in place":
            after = {name: text for name, text in after.items() if name in OLD}
            assert set(after) == set(OLD), run
            assert all(text in MIXTURE[name] for name, text in after.items()), run
        elif mode == "aside":
            assert after in (OLD, NEW, None), run
        else:
            assert after in (OLD, NEW), run
        if after is None:
            assert run["failed"] == OLD, run  # put back by the next save, even by one that fails
        assert run["again"] == NEW, run
        assert run["left"] == ["adapter"], run


def test_without_an_exchange_there_is_a_moment_without_a_folder(deaths):
    assert [run["after"] for run in deaths["aside"]].count(None) == 1


def test_files_are_flushed_together_and_before_the_folder_counts(folder, monkeypatch):
    all_at_once, real, after = threading.Barrier(3, timeout=20), os.fsync, []

    def fsync(descriptor):
        if not after and content(folder) == OLD:
            all_at_once.wait()  # passes when the new files and their folder wait together
        else:
            after.append(content(folder))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_folder(folder, fill_new)
    assert after == [NEW]  # the parent, once


# Stages of dead processes


def dead_pid() -> int:
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    return child.pid


@pytest.mark.parametrize("name", ["adapter", "my [odd] *name?", "run-1"])
def test_what_a_dead_process_left_is_swept(tmp_path, name):
    stale = tmp_path / f".veneer-stage-{name}-{dead_pid()}-0123abcd"
    make_old(stale)
    write_folder(tmp_path / name, fill_new)
    assert [entry.name for entry in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize(
    "name",
    [
        f".veneer-stage-adapter-{os.getppid()}-0123abcd",  # its process lives
        ".veneer-stage-adapter-2-1-0123abcd",  # of a folder called adapter-2
        ".veneer-stage-adapter-notes",
        "adapter-1-0123abcd",
    ],
)
def test_what_belongs_to_others_is_not_swept(tmp_path, name):
    make_old(tmp_path / name)
    write_folder(tmp_path / "adapter", fill_new)
    assert content(tmp_path / name) == OLD


def test_an_old_folder_that_was_put_aside_comes_back(tmp_path):
    make_old(tmp_path / f".veneer-stage-adapter-{dead_pid()}-0123abcd-old")
    with pytest.raises(RuntimeError):
        write_folder(tmp_path / "adapter", faults.refuse)
    assert content(tmp_path / "adapter") == OLD


# Where the folder is


def test_a_link_to_a_folder_stays_a_link(tmp_path, folder):
    link = tmp_path / "latest"
    link.symlink_to(folder, target_is_directory=True)
    write_folder(link, fill_new)
    assert link.is_symlink()
    assert content(folder) == NEW


@pytest.mark.parametrize("where", [".", ".."])
def test_the_current_folder_stays_the_current_folder(folder, monkeypatch, where):
    inside = folder / "inside"
    inside.mkdir()
    monkeypatch.chdir(folder if where == "." else inside)
    write_folder(Path(where), fill_new)
    assert Path("adapter_config.json" if where == "." else "../adapter_config.json").read_text() == "new config"
    inside.rmdir()
    assert content(folder) == NEW


def test_a_current_folder_that_was_deleted_is_no_obstacle(tmp_path, folder, monkeypatch):
    monkeypatch.chdir(tmp_path)
    gone = tmp_path / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    write_folder(folder, fill_new)
    assert content(folder) == NEW


@pytest.mark.parametrize("reason", ["a mount point", "a parent that cannot be written"])
def test_a_folder_that_cannot_be_renamed(folder, monkeypatch, reason):
    """Nothing may be made beside it: that is another file system, or read-only."""
    if reason == "a mount point":
        monkeypatch.setattr(Path, "is_mount", lambda path: path == folder)
    else:
        monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != folder.parent)
    real = os.mkdir

    def mkdir(path, *args, **kwargs):
        assert Path(path).parent != folder.parent
        real(path, *args, **kwargs)

    monkeypatch.setattr(os, "mkdir", mkdir)
    write_folder(folder, fill_new)
    assert content(folder) == NEW


def test_a_parent_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError, match="Not a directory|File exists"):
        write_folder(tmp_path / "file" / "adapter", fill_new)
    assert (tmp_path / "file").read_text() == "mine"


# Modes


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_follow_the_umask(tmp_path, umask, mode):
    def fill(stage):
        fill_new(stage)
        (stage / "adapter_model.safetensors").chmod(0o600)  # as safetensors makes it

    old = os.umask(umask)
    try:
        write_folder(tmp_path / "adapter", fill)
    finally:
        os.umask(old)
    assert {entry.stat().st_mode & 0o777 for entry in (tmp_path / "adapter").iterdir()} == {mode}


@pytest.mark.parametrize("way", faults.MODES)
def test_the_folder_keeps_its_mode(folder, way):
    folder.chmod(0o2770)
    with faults.mode(way):
        write_folder(folder, fill_new)
    assert folder.stat().st_mode & 0o7777 == 0o2770


# One file


def test_one_file(tmp_path):
    write_file(tmp_path / "f", b"one")
    write_file(tmp_path / "f", b"two")
    assert (tmp_path / "f").read_bytes() == b"two"
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_one_file_does_not_follow_a_link(tmp_path):
    (tmp_path / "other").write_bytes(b"mine")
    (tmp_path / "f").symlink_to(tmp_path / "other")
    write_file(tmp_path / "f", b"new")
    assert (tmp_path / "other").read_bytes() == b"mine"
    assert (tmp_path / "f").read_bytes() == b"new"


def test_a_fault_at_any_step_leaves_one_file_old_or_new(tmp_path):
    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    for n in range(1, 100):
        (tmp_path / "f").write_bytes(b"old")
        with faults.at_step(n, fail) as steps:
            try:
                write_file(tmp_path / "f", b"new")
            except OSError:
                assert (tmp_path / "f").read_bytes() in (b"old", b"new")
            else:
                assert (tmp_path / "f").read_bytes() == b"new"
        if len(steps) < n:
            break
    assert n > 3


def test_the_stage_of_a_dead_process_is_swept_for_one_file_too(tmp_path):
    (tmp_path / f".veneer-stage-f-{dead_pid()}-0123abcd").write_bytes(b"half")
    write_file(tmp_path / "f", b"new")
    assert [entry.name for entry in tmp_path.iterdir()] == ["f"]


def test_exchange_says_whether_it_worked(tmp_path):
    (tmp_path / "a").mkdir()
    assert write._exchange(tmp_path / "a", tmp_path / "missing") is False


def test_beginning_to_flush_is_possible_anywhere(tmp_path, monkeypatch):
    with (tmp_path / "f").open("xb", buffering=0) as stream:
        stream.write(b"x" * 10)
        write.start_flush(stream.fileno(), 0, 10)
        for function in (lambda: None, lambda: lambda *given: -1):  # another system, a file system that cannot
            monkeypatch.setattr(write, "_sync_file_range", function)
            write.start_flush(stream.fileno(), 0, 10)
    assert (tmp_path / "f").read_bytes() == b"x" * 10
