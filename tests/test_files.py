"""Files and folders are written atomically, and leftovers of killed processes are removed."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mlmkit.errors import UserError
from mlmkit.files import LOCK, PARTIAL, REPLACED, atomic, locked, new_folder

OLD = time.time() - 1000


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.rglob("*"))


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "file"
    for content in ("one", "two"):
        with atomic(path) as partial:
            partial.write_text(content)
            assert not path.exists() or path.read_text() == "one"
        assert (path.read_text(), names(tmp_path)) == (content, ["file"])
    with pytest.raises(ZeroDivisionError), atomic(path) as partial:
        partial.write_text("three")
        raise ZeroDivisionError
    assert (path.read_text(), names(tmp_path)) == ("two", ["file"])


def test_a_folder_takes_the_place_of_another(tmp_path):
    path = tmp_path / "folder"
    for content in ("one", "two"):
        with atomic(path, folder=True) as partial:
            (partial / content).mkdir()
            (partial / content / "file").touch()
        assert names(tmp_path) == sorted(["folder", content, "file"])


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_has_left_is_removed(tmp_path, folder):
    """But not files that another process is writing, or that are too young to tell."""
    code = f"""
import os, sys, signal
from pathlib import Path
from mlmkit.files import atomic
with atomic(Path(sys.argv[1]) / "killed", folder={folder}) as partial:
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", code, tmp_path], check=False)
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(PARTIAL)
    with atomic(tmp_path / "busy", folder=folder) as busy:
        with atomic(tmp_path / "one"):
            assert left.exists()
        for path in (left, busy):
            os.utime(path, (OLD, OLD))
        with atomic(tmp_path / "two"):
            assert (left.exists(), busy.exists()) == (False, True)


def test_a_lock_that_nobody_holds_is_removed(tmp_path):
    stale, held = tmp_path / f".stale{LOCK}", tmp_path / f".held{LOCK}"
    stale.touch()
    with locked(tmp_path / "held"):
        for path in (stale, held):
            os.utime(path, (OLD, OLD))
        with atomic(tmp_path / "file"):
            assert (stale.exists(), held.exists()) == (False, True)


def test_a_folder_is_put_back_if_the_process_was_killed_between_the_two_renames(tmp_path):
    lost, done, longer = (tmp_path / f".{name}.0123abcd{REPLACED}" for name in ("lost[1]", "done", "done.2"))
    for path in (lost, done, longer, tmp_path / "done"):
        path.mkdir()
        (path / "file").write_text(path.name)
    for name in ("lost[1]", "done"):
        with locked(tmp_path / name):
            pass
    assert {path.name for path in tmp_path.iterdir()} == {"done", "lost[1]", longer.name}
    assert [(tmp_path / name / "file").read_text() for name in ("done", "lost[1]")] == ["done", lost.name]


def test_a_mount_point_is_filled_where_it_is(tmp_path, monkeypatch):
    """A mount point, such as a container's volume, cannot be renamed."""
    path = tmp_path / "volume"
    (path / "lost+found").mkdir(parents=True)
    monkeypatch.setattr(Path, "is_mount", lambda self: self == path)
    inode = path.stat().st_ino
    for content in ("one", "two"):
        with new_folder(path, replaces="manifest") as partial:
            (partial / content).touch()
            (partial / "manifest").touch()
        assert names(path) == sorted(["lost+found", "manifest", content])
    assert path.stat().st_ino == inode
    with pytest.raises(UserError, match="exists"), new_folder(path):
        pass


@pytest.mark.skipif(not hasattr(os, "getuid") or os.getuid() != 0, reason="mounting needs root")
def test_a_real_mount_point(tmp_path):
    path = tmp_path / "volume"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "tmpfs", path], capture_output=True).returncode:
        pytest.skip("this system lets nobody mount")
    try:
        with new_folder(path) as partial:
            (partial / "manifest").touch()
        assert names(path) == ["manifest"]
    finally:
        subprocess.run(["umount", path], check=True)
