"""Write files and folders atomically, lock folders, check hashes, and locate models and the cache.

Every file that a kill could leave half written is written with `atomic`.
"""

import errno
import glob
import hashlib
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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

# Suffixes of hidden names beside a path: unfinished or to be deleted; the old folder while the new one replaces it; the
# new content of a mount point, before and after the old content was deleted.
PARTIAL, REPLACED, READY, MOVING = (f".mlmkit-{state}" for state in ("partial", "replaced", "ready", "moving"))
LOCK = ".mlmkit-lock"
RUN = "run.json"  # marks the folder of a training run, from its start
GRACE_SECONDS = 60.0  # a younger file may not yet be locked by the process that made it
CHECKSUM = "checksum"
HASHED_AT_ONCE = 8  # files; hashing releases the interpreter's lock
LARGEST_RECORD = 64 << 20  # bytes; a result.json with many slices has 0.2 MB

_say_once = cache(log.info)


@contextmanager
def atomic(path: Path, *, folder: bool = False, keep: bool = False) -> Iterator[Path]:
    """Yield a temporary name for a file or `folder`. When the block ends, sync it and rename it to `path`.

    A failure or a kill leaves `path` unchanged. Leftovers of killed processes beside it are removed. The umask decides
    who may read the result. Replace a folder only inside `locked`. With `keep`, a folder that another process has
    created in the meantime stays.
    """
    sweep(home(path))
    partial = _beside(path, PARTIAL)
    if folder:
        partial.mkdir()
    else:
        partial.touch(exist_ok=False)
    lock, mode = os.open(partial, os.O_RDONLY), partial.stat().st_mode & 0o666  # by the umask
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
    """Return the folder for temporary names: the parent of `path`, or `path` itself if it is a mount point."""
    return path if path.is_mount() else path.parent


def replace(new: Path, path: Path, *, keep: bool = False) -> None:
    """Replace `path` by `new`, a synced file or folder in `home(path)`. After a kill, `locked` finishes the job.

    A mount point cannot be renamed: its content is deleted, and the new content moved in.
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
    def leftovers(suffix: str) -> Iterator[Path]:  # of exactly this name: "run" must not match "run.2"
        return home(path).glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 8}{suffix}")

    for old in leftovers(REPLACED):
        if path.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:  # killed between the two renames
            old.rename(path)
    for new in leftovers(READY):
        for entry in content(path):
            _remove(entry)
        new.rename(new.with_suffix(MOVING))
    for new in leftovers(MOVING):
        for entry in sorted(new.iterdir(), key=lambda entry: entry.stat().st_mtime_ns):  # the manifest last
            entry.rename(path / entry.name)
        new.rmdir()
        sync(path)


def _beside(path: Path, suffix: str) -> Path:
    return home(path) / f".{path.name}.{secrets.token_hex(4)}{suffix}"


def write_text(path: Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: object) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sweep(folder: Path, *, age: float = GRACE_SECONDS) -> None:
    """Remove leftovers of killed processes from a folder: files `age` seconds old that no process has locked."""
    for leftover in (path for path in folder.glob(".*") if path.name.endswith((PARTIAL, LOCK))):
        with suppress(OSError):
            lock = os.open(leftover, os.O_RDONLY)
            try:
                # Locks may not reach other machines, so a young file may still be written by one of them.
                newest = max(path.stat().st_mtime for path in (leftover, *leftover.glob("*")))
                if time.time() - newest >= age and _try_lock(lock):
                    _remove(leftover)
            finally:
                os.close(lock)


def _try_lock(descriptor: int) -> bool:
    """Lock a file and return whether it worked; False if the system has no locks."""
    try:
        if fcntl is not None:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return fcntl is not None
    except OSError:
        return False


def content(folder: Path) -> list[Path]:
    """List a folder without `lost+found` and the temporary names that `atomic` writes into a mount point."""
    ours = f".{folder.name}."
    return [path for path in folder.iterdir() if not path.name.startswith(ours) and path.name != "lost+found"]


def remove(folder: Path) -> None:
    """Delete a folder atomically: it is renamed first, so a kill cannot leave a part of it."""
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
    """Create a folder that the user named, and its parents, with `atomic`. It stays `locked` until the block ends.

    A folder that contains the file `replaces` may be replaced. Raises `UserError` if `path` is any other folder that is
    not empty, or cannot be written.
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
    """Raise `UserError` if `new_folder` would refuse `path`: better now than after hours of work."""
    if (path.exists() or path.is_symlink()) and not path.is_dir():
        raise UserError(f"{path} exists and is not a folder: choose another folder")
    if not path.is_dir() or not content(path) or (replaces and (path / replaces).exists()):
        return
    if replaces:
        raise UserError(f"{path} has no {replaces}, so --overwrite leaves it alone: choose another folder")
    raise UserError(f"{path} exists: choose another folder, or replace it with --overwrite")


def locate_model(path: str) -> str:
    """Return a model's folder or hub name (USER/NAME). For the folder of a training run, the finished model in it.

    Raises `UserError` for a path that is neither, and for an unfinished run.
    """
    folder = Path(path)
    if not folder.exists() and (path.startswith((".", "/", "~")) or path.count("/") > 1):
        raise UserError(f"{path}: no such folder")
    if folder.is_file():
        raise UserError(f"{path} is a file: name the folder of the model or tokenizer instead")
    if not (folder / RUN).exists():
        return path
    if not (folder / "model").exists():
        raise UserError(f"{path} is an unfinished training run: finish it, or name a folder in {path}/checkpoints")
    _say_once(f"{path} is a training run: using its model, {path}/model")
    return f"{path}/model"


# ---------------------------------------------------------------- locks


@contextmanager
def locked(path: Path, *, wait: bool = False) -> Iterator[None]:
    """Keep other processes out of a folder while the block reads, creates or replaces it. Creates its parents.

    The lock ends with the process. It is held on a file beside the folder, because the folder may be replaced; if that
    place is read-only, the folder cannot be replaced, and the lock is held on the folder itself. A replacement that a
    kill interrupted is finished first. Raises `UserError` if another process has the lock, unless told to `wait`.
    """
    path = path.resolve()
    lock = home(path) / f".{path.name}{LOCK}"
    try:
        descriptor = _acquire(lock, path, wait=wait)
    except BlockingIOError:
        raise UserError(f"another process is using {path}: wait for it to finish") from None
    except OSError as error:
        raise UserError(f"cannot write {lock}: {error.strerror}") from None
    try:
        _finish_replacing(path)
        yield
    finally:
        with suppress(OSError):  # Windows cannot remove an open file
            lock.unlink()
        os.close(descriptor)


def _acquire(lock: Path, path: Path, *, wait: bool) -> int:
    """Return a descriptor that holds the lock. Raises `BlockingIOError` if another process has it."""
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
            log.warning("%s: this file system has no locks (%s): run one process at a time", path, error.strerror)
        if os.fstat(descriptor).st_nlink:
            return descriptor
        os.close(descriptor)  # its owner removed the file after we opened it: try again


# ---------------------------------------------------------------- records


def write_record(path: Path, values: dict[str, Any]) -> None:
    """Write a JSON object with a checksum atomically."""
    write_json(path, sealed(values))


def read_record(path: Path, remedy: str) -> dict[str, Any]:
    """Read what `write_record` wrote. Raises `DamagedError`, ending with the `remedy`, for anything else."""
    try:
        with path.open("rb") as file:
            content = file.read(LARGEST_RECORD + 1)
        return unsealed(json.loads(content.decode()) if len(content) <= LARGEST_RECORD else None)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise DamagedError(f"{path} is damaged ({error.strerror}): {remedy}") from None
    except (ValueError, RecursionError) as error:
        raise DamagedError(f"{path} is damaged ({error}): {remedy}") from None


def sealed(values: dict[str, Any]) -> dict[str, Any]:
    """Add a checksum to the values of a record."""
    values = json.loads(json.dumps(values))  # as they will be read back: keys are strings
    return {**values, CHECKSUM: _checksum(values)}


def unsealed(values: object) -> dict[str, Any]:
    """Return the values without their checksum. Raises `ValueError` if it is missing or does not match."""
    if not isinstance(values, dict) or CHECKSUM not in values:
        raise ValueError("it has no checksum")
    values = {**values}
    if values.pop(CHECKSUM) != _checksum(values):
        raise ValueError("its checksum does not match its content")
    return values


def _checksum(values: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


# ---------------------------------------------------------------- cache and hashes


def cache_root() -> Path:
    """Return the cache folder: `$MLMKIT_CACHE`, by default `~/.cache/mlmkit`."""
    return Path(os.environ.get("MLMKIT_CACHE") or Path.home() / ".cache" / "mlmkit")


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def recorded_sha256(paths: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's bytes, which are remembered in the cache.

    A file of the same path, size and time of modification is not hashed again, except within `verifying`. A file that
    was modified less than two seconds before is not remembered: a later change might not show in its time.
    """
    known = {folder: _read_hashes(folder) for folder in {path.parent for path in paths}}
    states = {path: [(state := path.stat()).st_size, state.st_mtime_ns] for path in paths}
    hashes: dict[Path, str] = {}
    for path, state in states.items():
        *recorded, sha256 = known[path.parent].get(path.name, [""])
        if recorded == state and not _hashed_again:
            hashes[path] = sha256
    latest, new = time.time_ns() - 2 * 10**9, [path for path in states if path not in hashes]
    with ThreadPoolExecutor(HASHED_AT_ONCE) as pool:
        hashes |= zip(new, pool.map(file_sha256, new), strict=True)
    kept: dict[Path, dict[str, Any]] = {}
    for path in new:
        if states[path][1] < latest:
            kept.setdefault(path.parent, {})[path.name] = [*states[path], hashes[path]]
    for folder, found in kept.items():
        with suppress(OSError, UserError):  # a cache that cannot be written costs time only
            record = _hashes_path(folder)
            record.parent.mkdir(parents=True, exist_ok=True)
            write_record(record, _read_hashes(folder) | found)
    return [hashes[path] for path in paths]


def _hashes_path(folder: Path) -> Path:
    """The record of the hashes of the files in a folder."""
    name = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:32]
    return cache_root() / "hashes" / name[:2] / f"{name}.json"


def _read_hashes(folder: Path) -> dict[str, Any]:
    try:
        return read_record(_hashes_path(folder), "")
    except (DamagedError, OSError):
        return {}


_hashed_again: list[bool] = []  # not a context variable, which threads do not see


@contextmanager
def verifying() -> Iterator[None]:
    """Within the block, `recorded_sha256` hashes every file again."""
    _hashed_again.append(True)
    try:
        yield
    finally:
        _hashed_again.clear()


def hash_tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder and its subfolders, by relative path."""
    files = filter(Path.is_file, sorted(folder.rglob("*")))
    return {path.relative_to(folder).as_posix(): file_sha256(path) for path in files}


def changed_file(folder: Path, hashes: dict[str, str]) -> str:
    """Return the first file that is missing or whose SHA-256 differs, or ""."""
    paths = ((name, folder / name, sha256) for name, sha256 in hashes.items())
    return next((name for name, path, sha256 in paths if not path.is_file() or file_sha256(path) != sha256), "")


def sync(path: Path) -> None:
    """Flush a file or folder to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
