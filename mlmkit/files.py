"""Folders that appear whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mlmkit.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


@contextmanager
def new_folder(path: Path, *, replaces: str = "") -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success sync it and rename it to `path`, on failure remove it.

    A folder that holds the file `replaces` may be replaced. Raises `UserError` when `path` is another one that is not
    empty, or cannot be written.
    """
    refuse_existing(path, replaces)
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        building.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield building
        for file in building.rglob("*"):
            if file.is_file():
                sync(file)
        sync(building)
        replaced = building.with_name(f"{building.name}.replaced")
        if path.exists():
            path.rename(replaced)
        building.rename(path)
        sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def refuse_existing(path: Path, replaces: str = "") -> None:
    """Raise `UserError` now rather than after hours of work if `new_folder` would refuse `path`."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder: choose another folder")
    if not path.is_dir() or not any(path.iterdir()) or (replaces and (path / replaces).exists()):
        return
    if replaces:
        raise UserError(f"{path} holds no {replaces}, so --overwrite leaves it alone: choose another folder")
    raise UserError(f"{path} exists: choose another folder, or replace it with --overwrite")


def refuse_missing(path: str) -> None:
    """Raise `UserError` for a path where nothing is and which cannot be the name of a model on the hub (USER/NAME)."""
    if not Path(path).exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{path}: no such folder")


@contextmanager
def exclusive(path: Path, taken: str, *, temporary: bool = False) -> Iterator[None]:
    """Keep others out while the block runs, by a lock on a file. It ends with the process.

    A `temporary` file is created for the lock and removed with it. Raises `UserError` saying `taken` when another
    process holds the lock.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("ab" if temporary else "rb")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        if not os.fstat(file.fileno()).st_nlink:  # removed by its owner since we opened it
            raise UserError(taken)
        try:
            yield
        finally:
            if temporary:
                with suppress(OSError):  # Windows removes no open file
                    path.unlink()


def cache_root() -> Path:
    """Where mlmkit keeps what it can make again: `$MLMKIT_CACHE`, by default `~/.cache/mlmkit`."""
    return Path(os.environ.get("MLMKIT_CACHE") or Path.home() / ".cache" / "mlmkit")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
