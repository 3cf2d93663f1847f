"""Files and folders that are written atomically, locks, and where models and the cache lie."""

import hashlib
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from mlmkit.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

PARTIAL, REPLACED = ".mlmkit-partial", ".mlmkit-replaced"
YOUNG = 60  # seconds in which a file may not yet have been locked by the process that made it

_say_once = cache(logging.getLogger(__name__).info)


@contextmanager
def atomic(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield another name for a file or a `folder`; when the block ends, sync what was written and rename it to `path`.

    A failure or a kill leaves `path` as it was. What killed processes have left beside it is removed. The umask decides
    who may read the result. A mount point cannot be renamed: the entries of such a folder are moved one by one.
    """
    home = path if folder and path.is_mount() else path.parent
    _sweep(home)
    partial = home / f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
    if folder:
        partial.mkdir()
    else:
        partial.touch(exist_ok=False)
    lock = os.open(partial, os.O_RDONLY)
    try:
        _try_lock(lock)
        yield partial
        for file in [*filter(Path.is_file, partial.rglob("*")), partial]:
            sync(file)
        replaced = partial.with_suffix(REPLACED)
        if home == path:
            for entry in _content(path):
                _remove(entry)
            for entry in sorted(partial.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):  # the manifest last
                entry.rename(path / entry.name)
        elif folder and path.exists():
            path.rename(replaced)
            partial.rename(path)
        else:
            partial.replace(path)
        sync(home)
        shutil.rmtree(replaced, ignore_errors=True)
    finally:
        os.close(lock)
        _remove(partial)


def _sweep(home: Path) -> None:
    """Remove what killed processes have left in a folder: what is old, and no process holds the lock of."""
    for left in home.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                if time.time() - left.stat().st_mtime > YOUNG and _try_lock(lock):
                    _remove(left)
            finally:
                os.close(lock)
    for left in home.glob(f".*{REPLACED}"):  # killed between two renames
        place = home / left.name[1 : -len(REPLACED) - 9]
        with suppress(OSError):
            if place.exists():
                shutil.rmtree(left)
            else:
                left.rename(place)


def _try_lock(descriptor: int) -> bool:
    """Whether the file could be locked; never where the system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fcntl is not None
    except OSError:
        return False


def _content(folder: Path) -> list[Path]:
    """What is in a folder, but for what we are writing there and what a file system keeps in its root."""
    return [path for path in folder.iterdir() if path.suffix not in (PARTIAL, REPLACED) and path.name != "lost+found"]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, replaces: str = "") -> Iterator[Path]:
    """`atomic` for a folder that the user named, with its parents.

    A folder that holds the file `replaces` may be replaced. Raises `UserError` when `path` is another one that is not
    empty, or cannot be written.
    """
    refuse_existing(path, replaces)
    path = path.resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic(path, folder=True) as partial:
            yield partial
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def refuse_existing(path: Path, replaces: str = "") -> None:
    """Raise `UserError` now rather than after hours of work if `new_folder` would refuse `path`."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder: choose another folder")
    if not path.is_dir() or not _content(path) or (replaces and (path / replaces).exists()):
        return
    if replaces:
        raise UserError(f"{path} holds no {replaces}, so --overwrite leaves it alone: choose another folder")
    raise UserError(f"{path} exists: choose another folder, or replace it with --overwrite")


def locate_model(path: str) -> str:
    """The model's folder or hub name (USER/NAME): of a training run's folder, that of the finished model in it.

    Raises `UserError` for what can be neither.
    """
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{path}: no such folder")
    if folder.is_file():
        raise UserError(f"{path} is a file: name the folder of the model or tokenizer that it belongs to")
    if not (folder / "run.json").exists():
        return path
    if not (folder / "model").exists():
        raise UserError(f"{path} is an unfinished training run: train on, or name a folder in {path}/checkpoints")
    _say_once(f"{path} is a training run: taking the model in it, {path}/model")
    return f"{path}/model"


@contextmanager
def exclusive(path: Path, taken: str) -> Iterator[None]:
    """Keep others out while the block runs, by a lock on a file. It ends with the process.

    Raises `UserError` saying `taken` when another holds it.
    """
    with path.open("rb") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(taken) from None
        yield


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
