"""Folders that appear whole or not at all."""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlmkit.errors import UserError


@contextmanager
def new_folder(path: Path, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success sync it and rename it to `path`, on failure remove it.

    Raises `UserError` when `path` exists and `overwrite` is not set, or cannot be written.
    """
    refuse_existing(path, overwrite)
    try:
        path.absolute().parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.absolute().parent))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
    try:
        building.chmod(0o777 & ~_umask())  # mkdtemp makes it private
        yield building
        for file in building.rglob("*"):
            if file.is_file():
                _sync(file)
        _sync(building)
        replaced = building.with_name(f"{building.name}.replaced")
        if path.exists():
            path.rename(replaced)
        building.rename(path)
        _sync(path.absolute().parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def refuse_existing(path: Path, overwrite: bool) -> None:
    """Raise `UserError` now rather than after hours of work if `path` would be overwritten unasked."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder: choose another --output")
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise UserError(f"{path} exists: choose another --output, or replace it with --overwrite")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
