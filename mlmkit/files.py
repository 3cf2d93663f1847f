"""Folders that appear whole or not at all."""

import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from mlmkit.errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_say_once = cache(logging.getLogger(__name__).info)


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


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
