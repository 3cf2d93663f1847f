"""Files and folders that are written atomically, locks, and where models and the cache lie."""

import hashlib
import json
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
YOUNG = 60.0  # seconds in which a file may not yet have been locked by the process that made it

_say_once = cache(logging.getLogger(__name__).info)


@contextmanager
def atomic(path: Path, *, folder: bool = False) -> Iterator[Path]:
    """Yield another name for a file or a `folder`; when the block ends, sync what was written and rename it to `path`.

    A failure or a kill leaves `path` as it was. What killed processes have left beside it is removed. The umask decides
    who may read the result.
    """
    sweep(home(path))
    partial = home(path) / f".{path.name}.{secrets.token_hex(4)}{PARTIAL}"
    if folder:
        partial.mkdir()
    else:
        partial.touch(exist_ok=False)
    lock, mode = os.open(partial, os.O_RDONLY), partial.stat().st_mode & 0o666  # as the umask has it
    try:
        _try_lock(lock)
        yield partial
        for file in [*filter(Path.is_file, partial.rglob("*")), partial]:
            if file.is_file():
                file.chmod(mode)  # safetensors makes its files private
            sync(file)
        replace(partial, path)
    finally:
        os.close(lock)
        _remove(partial)


def home(path: Path) -> Path:
    """The folder to write in what is to become `path`: beside it, or in it if it is a mount point."""
    return path if path.is_mount() else path.parent


def replace(new: Path, path: Path) -> None:
    """Put a file or folder in `home(path)`, synced, in the place of `path`.

    A mount point cannot be renamed: entries are moved there one by one, in the order in which they were written.
    """
    replaced = home(path) / f".{path.name}.{secrets.token_hex(4)}{REPLACED}"
    if path.is_mount():
        for entry in content(path):
            _remove(entry)
        for entry in sorted(new.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):
            entry.rename(path / entry.name)
        new.rmdir()
    elif path.is_dir():
        path.rename(replaced)
        new.rename(path)
    else:
        new.replace(path)
    sync(home(path))
    shutil.rmtree(replaced, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """`atomic`, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """`atomic`, for people to read."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sweep(folder: Path, *, age: float = YOUNG) -> None:
    """Remove what killed processes have left in a folder: what is `age` seconds old and no process has locked."""
    for left in folder.glob(f".*{PARTIAL}"):
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                if time.time() - left.stat().st_mtime >= age and _try_lock(lock):
                    _remove(left)
            finally:
                os.close(lock)
    for left in folder.glob(f".*{REPLACED}"):  # killed between two renames
        place = folder / left.name[1 : -len(REPLACED) - 9]
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


def content(folder: Path) -> list[Path]:
    """What is in a folder, but for what we write in a mount point until it is done, and `lost+found`."""
    ours = f".{folder.name}."
    return [path for path in folder.iterdir() if not path.name.startswith(ours) and path.name != "lost+found"]


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
    if not path.is_dir() or not content(path) or (replaces and (path / replaces).exists()):
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
