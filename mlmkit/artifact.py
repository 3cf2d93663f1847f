"""The artifact's manifest, `mlmkit.json`: what the folder holds, and proof that it is still that.

Its format is read by the backends and written by `mlmkit.export`, so it stands below both.
"""

import hashlib
import json
import os
import re
import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mlmkit.bounds import largest_file
from mlmkit.errors import CheckError, UserError
from mlmkit.files import file_sha256, read_record, write_record
from mlmkit.tokenizer import Tokenizer

MANIFEST, CARD = "mlmkit.json", "README.md"
FORMAT = 3
GRAPH, PLAN = "model.onnx", "model.plan"
NEEDED = (GRAPH, "tokenizer.json", "tokenizer_config.json", "config.json")
# Files of one folder, on any system: no separators, no drives, no streams, no devices of Windows, nothing hidden.
FILE_NAME = re.compile(
    r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[a-z0-9_]([a-z0-9_.-]{0,126}[a-z0-9_])?", re.ASCII | re.IGNORECASE
)
STATES = {
    "changed": "is not the file that was exported (its SHA-256 differs)",
    "missing": "is missing",
    "not a plain file": "is not a plain file of the folder (if it is a link, copy what it leads to: cp -rL)",
    "unreadable": "cannot be read",
    "too large": "is larger than any such file that we know",
}
DEEPEST = 16  # objects within objects
LARGEST_GRAPH = 2 << 30  # bytes, as protobuf itself has it
AGAIN = "export the checkpoint again (mlmkit export CHECKPOINT --output ARTIFACT)"
DYNAMIC_INT8 = "int8-dynamic"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", DYNAMIC_INT8)
CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]\+?")
FLAVOURS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


@dataclass(frozen=True)
class Profile:
    """The smallest, the most usual and the largest size of each axis that a TensorRT plan is built for."""

    name: str
    batch: tuple[int, int, int]
    seq: tuple[int, int, int]
    masked: tuple[int, int, int]


@dataclass(frozen=True)
class TensorRT:
    """What the plan was built by and for: a plan is machine code, and runs on no other version.

    `flavour` is a key of `FLAVOURS`. `targets` are compute capabilities: "9.0", or "12.0+" for that and later ones. By
    profile: `layers` counts the layers by the type that they write, `fused_attention` those that compute all of an
    attention, and `scratch_mib` is the memory that a context takes beside the weights. `parity` is the report of the
    plan itself, made on `gpu`; both are None until a GPU has run it.
    """

    flavour: str
    version: str
    targets: list[str]
    profiles: list[Profile]
    layers: dict[str, dict[str, int]]
    fused_attention: dict[str, int]
    scratch_mib: dict[str, float]
    gpu: str | None
    parity: dict[str, Any] | None


@dataclass(frozen=True)
class Manifest:
    """`files` maps each file's name to its SHA-256. `fingerprint` is that of the checkpoint's weights.

    `sees_padding`: rows of different lengths must not share a batch (see `mlmkit.model.sees_padding`).
    `parity` is the report that the export made, in natural-log units; `drift_allowed` says that its bounds did not hold
    and the user wanted the artifact all the same. `calibration` is what a lower precision was fitted to.
    """

    format: int
    files: dict[str, str]
    fingerprint: str
    architecture: str
    vocabulary_size: int
    max_length: int
    precision: str
    opset: int
    top_k: int
    sees_padding: bool
    parity: dict[str, Any]
    drift_allowed: bool
    calibration: dict[str, Any] | None
    tensorrt: TensorRT | None
    mlmkit_version: str


def is_artifact(folder: Path) -> bool:
    """Whether the folder claims to be an artifact."""
    return (folder / MANIFEST).is_file()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder but the manifest and the model card, which its owner may edit."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, CARD)}


def weight_bytes(folder: Path) -> int:
    """The size of an artifact's graph with its weights."""
    return sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest, atomically and last: a folder with a manifest is complete.

    Raises `CheckError` for one that `parse_manifest` would refuse, such as one with a figure that is not finite.
    """
    values = json.loads(json.dumps(asdict(manifest)))
    try:
        _decode(values)
    except ValueError as error:
        raise CheckError(f"the manifest cannot be written: {error}") from None
    write_record(folder / MANIFEST, values)


@dataclass(frozen=True)
class CheckedFile:
    """A file that the manifest lists, as it was when it was hashed.

    `state` is `ok` or a key of `STATES`. `content` is kept for the files in `NEEDED`: what was hashed is what is used.
    The others are large, and opened again by their path: `stamp` (device, inode, size, time of the last write) tells
    the file from one that has taken its place since.
    """

    state: str
    content: bytes = b""
    stamp: tuple[int, ...] = ()


def open_files(folder: Path) -> tuple[Manifest, dict[str, CheckedFile]]:
    """Read the manifest and check every file against it.

    Raises `UserError` for another format, a missing or changed file, or a name that leads out of the folder.
    """
    manifest = parse_manifest(folder)
    files = check_files(folder, manifest)
    for name, file in files.items():
        if file.state != "ok":
            raise UserError(f"{folder}: {name} {STATES[file.state]}: {AGAIN}")
    return manifest, files


def read_manifest(folder: Path) -> Manifest:
    """The manifest alone, every file checked. Raises as `open_files` does."""
    return open_files(folder)[0]


def refuse_changes(folder: Path, files: Mapping[str, CheckedFile]) -> None:
    """Raise `UserError` if a file is no longer the one that was hashed: call it after opening files by their path."""
    for name, file in files.items():
        path = folder / name
        if not path.exists() or _stamp(path.stat()) != file.stamp:
            raise UserError(f"{folder}: {name} was replaced while the artifact was being loaded: run it again")


def parse_manifest(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked. Raises `UserError` for what is not one of this format."""
    try:
        return _decode(read_record(folder / MANIFEST, AGAIN))
    except ValueError as error:
        raise UserError(f"{folder}/{MANIFEST}: {error}: {AGAIN}") from None


def check_files(folder: Path, manifest: Manifest) -> dict[str, CheckedFile]:
    """Each file that the manifest lists, read once and compared with its hash."""
    return {name: _check(folder / name, sha256) for name, sha256 in manifest.files.items()}


def _check(path: Path, expected: str) -> CheckedFile:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return CheckedFile("not a plain file")
    if not path.exists():
        return CheckedFile("missing")
    try:
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            if path.name in NEEDED and stamp[2] > (LARGEST_GRAPH if path.name == GRAPH else largest_file(path.name)):
                return CheckedFile("too large")
            content = file.read() if path.name in NEEDED else b""
            digest = hashlib.sha256(content) if path.name in NEEDED else hashlib.file_digest(file, "sha256")
    except OSError:
        return CheckedFile("unreadable")
    return CheckedFile("ok" if digest.hexdigest() == expected else "changed", content, stamp)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_tokenizer(folder: Path, manifest: Manifest, files: Mapping[str, CheckedFile]) -> Tokenizer:
    """The artifact's tokenizer. Raises `UserError` if it or `config.json` does not fit the model's vocabulary."""
    contents = {name: files[name].content for name in NEEDED}
    tokenizer, size = Tokenizer.from_folder(folder, contents), manifest.vocabulary_size
    if tokenizer.vocabulary_size > size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocabulary_size - 1} but the model's vocabulary "
            f"has {size}: {AGAIN}"
        )
    try:
        config = json.loads(contents["config.json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: config.json cannot be read: {error}: {AGAIN}") from None
    found = config.get("vocab_size", size) if isinstance(config, dict) else None
    if found != size:
        raise UserError(
            f"{folder}: config.json says a vocabulary of {reprlib.repr(found)}, the model has {size}: {AGAIN}"
        )
    # Of RoBERTa's table of 514 rows 512 are for tokens, which its tokenizer says.
    limits = (tokenizer.limit, config.get("max_position_embeddings"))
    if (most := min(limit for limit in (*limits, 1 << 31) if type(limit) is int)) < manifest.max_length:
        raise UserError(
            f"{folder}: {MANIFEST} says rows of {manifest.max_length} tokens, and the model takes {most}: {AGAIN}"
        )
    return tokenizer


def report_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """A report of the manifest (parity, calibration) for people: each entry in words, and its value."""
    rows = []
    for name, value in report.items():
        words = name.replace("_", " ").replace("log prob", "log-probability")
        if isinstance(value, dict):
            rows += [(f"{words}, {inner}", shown) for inner, shown in report_rows(value)]
        elif isinstance(value, float):
            figure = f"{value:.4f}" if abs(value) >= 0.1 else f"{value:.1e}"
            is_share = name.endswith(("agreement", "unknown_characters"))
            rows.append((words, f"{value:.2%}" if is_share else figure))
        else:
            rows.append((words, f"{value:,}" if type(value) is int else str(value)))
    return rows


def _decode(values: dict[str, Any]) -> Manifest:
    """The manifest in a file's values. Raises `ValueError` in words."""
    if values.get("format") != FORMAT:
        raise ValueError(f"of format {reprlib.repr(values.get('format'))[:100]}, and this mlmkit reads {FORMAT}")
    _check_plain(values, DEEPEST)
    manifest: Manifest = _parse(Manifest, values, "")
    if manifest.precision not in PRECISIONS:
        raise ValueError(f"no precision {reprlib.repr(manifest.precision)}")
    if (built := manifest.tensorrt) and built.flavour not in FLAVOURS:
        raise ValueError(f"no flavour of TensorRT {reprlib.repr(built.flavour)}")
    if built and not (PLAN in manifest.files and built.profiles and built.targets):
        raise ValueError(f"tensorrt without {PLAN}, profiles or targets")
    if built and (built.gpu is None) != (built.parity is None):
        raise ValueError("tensorrt.gpu and tensorrt.parity are not both there or both null")
    if built and (wrong := [text for text in built.targets if not CAPABILITY.fullmatch(text)]):
        raise ValueError(f"no compute capability {reprlib.repr(wrong[0])}")
    if missing := [name for name in NEEDED if name not in manifest.files]:
        raise ValueError(f"does not list {missing[0]}")
    taken = {MANIFEST}  # names that differ in case alone are one file on some systems
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name) or name.casefold() in taken:
            raise ValueError(f"{reprlib.repr(name)} is not a plain file of the folder")
        taken.add(name.casefold())
    return manifest


def _check_plain(value: Any, levels: int) -> None:
    """Raise `ValueError` for what JSON allows and nobody can show or reckon with."""
    if levels == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{reprlib.repr(value)} has characters that cannot be printed")
    if isinstance(value, int | float) and not abs(value) < 1 << 63:  # so that NaN is refused too
        raise ValueError("a number is not finite, or too large")
    if isinstance(value, dict):
        _check_plain([*value, *value.values()], levels)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, levels - 1)


def _parse(kind: Any, value: Any, name: str) -> Any:
    """A JSON value as `kind` (a dataclass, or what its fields are made of). Raises `ValueError` naming the field."""
    origin, arguments = get_origin(kind), get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else _parse(next(item for item in arguments if item is not NoneType), value, name)
    if is_dataclass(kind) and isinstance(kind, type) and isinstance(value, dict):
        hints = get_type_hints(kind)
        if missing := [field.name for field in fields(kind) if field.name not in value]:
            raise ValueError(f"{name}{missing[0]!r} is missing")
        return kind(**{key: _parse(hint, value[key], f"{name}{key}.") for key, hint in hints.items()})
    if origin is dict and isinstance(value, dict):
        return {key: _parse(arguments[1], item, f"{name}{key}.") for key, item in value.items()}
    if origin is list and isinstance(value, list):
        return [_parse(arguments[0], item, name) for item in value]
    if origin is tuple and isinstance(value, list) and len(value) == len(arguments):
        return tuple(_parse(item_kind, item, name) for item_kind, item in zip(arguments, value, strict=True))
    # type, not isinstance: True is an int to Python, but no count
    if kind is Any or (type(value) is kind and not (kind is int and value not in range(1, 1 << 31))):
        return value
    raise ValueError(f"{reprlib.repr(name.rstrip('.'))} is of a wrong type or value")
