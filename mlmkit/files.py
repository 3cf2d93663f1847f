"""Files and folders that are written atomically, locks, checksums, and where models and the cache lie."""

import errno
import glob
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
from typing import Any

from mlmkit.errors import DamagedError, UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

log = logging.getLogger(__name__)

# Hidden names beside a path: what is not finished or to be deleted, the old folder while the new one takes its place,
# and the new content of a mount point before and after the old one was deleted.
PARTIAL, REPLACED, READY, MOVING = (f".mlmkit-{state}" for state in ("partial", "replaced", "ready", "moving"))
LOCK = ".mlmkit-lock"
RUN = "run.json"  # what a training run's folder holds from its beginning
YOUNG = 60.0  # seconds in which a file may not yet have been locked by the process that made it
CHECKSUM = "checksum"
LARGEST_RECORD = 64 << 20  # bytes; a result.json of many slices and paradigms has 0.2 MB

_say_once = cache(log.info)


@contextmanager
def atomic(path: Path, *, folder: bool = False, keep: bool = False) -> Iterator[Path]:
    """Yield another name for a file or a `folder`; when the block ends, sync what was written and rename it to `path`.

    A failure or a kill leaves `path` as it was. What killed processes have left beside it is removed. The umask decides
    who may read the result. A folder is replaced only within `locked`; with `keep`, one that another process has put
    there meanwhile stays.
    """
    sweep(home(path))
    partial = _beside(path, PARTIAL)
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
        replace(partial, path, keep=keep)
    finally:
        os.close(lock)
        _remove(partial)


def home(path: Path) -> Path:
    """The folder to write in what is to become `path`: beside it, or in it if it is a mount point."""
    return path if path.is_mount() else path.parent


def replace(new: Path, path: Path, *, keep: bool = False) -> None:
    """Put a file or folder in `home(path)`, synced, in the place of `path`. What a kill interrupts, `locked` finishes.

    A mount point cannot be renamed: its content is deleted, and the new one moved there.
    """
    if path.is_mount():
        new.rename(_beside(path, READY))
    elif path.is_dir() and not keep:
        path.rename(_beside(path, REPLACED))
        new.rename(path)
    else:
        try:
            new.replace(path)
        except OSError:
            if not (keep and path.is_dir()):
                raise
    sync(home(path))
    if path.is_dir():
        _finish_replacing(path)


def _finish_replacing(path: Path) -> None:
    def left(suffix: str) -> Iterator[Path]:  # of this name alone: "run" is no beginning of "run.2" here
        return home(path).glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}{suffix}")

    for old in left(REPLACED):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between two renames
            old.rename(path)
    for new in left(READY):
        for entry in content(path):
            _remove(entry)
        new.rename(new.with_suffix(MOVING))
    for new in left(MOVING):
        for entry in sorted(new.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):  # a manifest is written last
            entry.rename(path / entry.name)
        new.rmdir()
        sync(path)


def _beside(path: Path, suffix: str) -> Path:
    return home(path) / f".{path.name}.{secrets.token_hex(4)}{suffix}"


def write_text(path: Path, text: str) -> None:
    """`atomic`, in UTF-8."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """`atomic`, for people to read."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sweep(folder: Path, *, age: float = YOUNG) -> None:
    """Remove what killed processes have left in a folder: what is `age` seconds old and no process has locked."""
    for left in (path for path in folder.glob(".*") if path.name.endswith((PARTIAL, LOCK))):  # the folder read once
        with suppress(OSError):
            lock = os.open(left, os.O_RDONLY)
            try:
                if time.time() - left.stat().st_mtime >= age and _try_lock(lock):
                    _remove(left)
            finally:
                os.close(lock)


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


def remove(folder: Path) -> None:
    """Delete a folder, which is gone at once and as a whole even if the process is killed meanwhile."""
    with suppress(FileNotFoundError):
        doomed = folder.rename(_beside(folder, PARTIAL))
        shutil.rmtree(doomed, ignore_errors=True)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextmanager
def new_folder(path: Path, *, replaces: str = "") -> Iterator[Path]:
    """`atomic` for a folder that the user named, with its parents, `locked` until the block ends.

    A folder that holds the file `replaces` may be replaced. Raises `UserError` when `path` is another one that is not
    empty, or cannot be written.
    """
    path = path.resolve()
    try:
        with locked(path):
            refuse_existing(path, replaces)
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
    if not (folder / RUN).exists():
        return path
    if not (folder / "model").exists():
        raise UserError(f"{path} is an unfinished training run: train on, or name a folder in {path}/checkpoints")
    _say_once(f"{path} is a training run: taking the model in it, {path}/model")
    return f"{path}/model"


# ---------------------------------------------------------------- locks


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder that is looked at, made or replaced in the block; with its parents.

    The lock ends with the process. It is on a file beside the folder, as the folder itself may be replaced; where
    nobody may write there, nobody can replace the folder, and the lock is on itself. What a killed process was
    replacing is put in order first. Raises `UserError` if another process has the lock, or `wait`s for it.
    """
    path = path.resolve()
    lock = home(path) / f".{path.name}{LOCK}"
    try:
        descriptor = _acquire(lock, path, wait=wait)
    except BlockingIOError:
        raise UserError(f"another process is at work in {path}: wait for it") from None
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error.strerror}") from None
    try:
        _finish_replacing(path)
        yield
    finally:
        with suppress(OSError):  # Windows removes no open file
            lock.unlink()
        os.close(descriptor)


def _acquire(lock: Path, path: Path, *, wait: bool) -> int:
    """A descriptor that holds the lock. Raises `BlockingIOError` if another process does."""
    while True:
        try:
            lock.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS) or not path.is_dir():
                raise
            descriptor = os.open(path, os.O_RDONLY)
        try:
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            os.close(descriptor)
            raise
        except OSError as error:
            log.warning("%s: no locks on this file system (%s): run one process at a time", path, error.strerror)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # removed by its owner since we opened it


# ---------------------------------------------------------------- records


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object with a checksum, atomically."""
    write_json(path, sealed(values))


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """What `write_record` wrote there. Raises `DamagedError`, which ends with the `remedy`, for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_RECORD + 1)
        return unsealed(json.loads(content.decode()) if len(content) <= LARGEST_RECORD else None)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedError(f"{path} is damaged ({error.strerror}): {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}): {remedy}") from None


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """The values with a checksum of them, for JSON."""
    values = json.loads(json.dumps(values))  # as they will be read: keys are text
    return {**values, CHECKSUM: _checksum(values)}


def unsealed(values: object) -> dict[str, Any]:
    """The values without their checksum. Raises `ValueError` if there is none, or it is that of other values."""
    if not isinstance(values, dict) or CHECKSUM not in values:
        raise ValueError("it has no checksum, as files of mlmkit have")
    values = {**values}
    if values.pop(CHECKSUM) != _checksum(values):
        raise ValueError("its checksum is that of another content")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- places


def cache_root() -> Path:
    """Where mlmkit keeps what it can make again: `$MLMKIT_CACHE`, by default `~/.cache/mlmkit`."""
    return Path(os.environ.get("MLMKIT_CACHE") or Path.home() / ".cache" / "mlmkit")


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_tree(folder: Path) -> dict[str, str]:
    """SHA-256 of each file in a folder, by its path there."""
    files = filter(Path.is_file, sorted(folder.rglob("*")))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def changed_file(folder: Path, hashes: dict[str, str]) -> str:
    """The first file that is missing or has another SHA-256; "" if there is none."""
    paths = ((name, folder / name, sha256) for name, sha256 in hashes.items())
    return next((name for name, path, sha256 in paths if not path.is_file() or file_sha256(path) != sha256), "")


def sync(path: Path) -> None:
    """Wait until a file's or folder's content is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
