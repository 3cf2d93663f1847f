"""The artifact's manifest, `mlmkit.json`: it lists the files of the folder with their hashes and describes the model.

The backends read it and `mlmkit.export` writes it, so this module depends on neither.
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
GRAPH, WEIGHTS, PLAN = "model.onnx", "model.onnx.data", "model.plan"
ONNX_FOLDER = "onnx"  # where other tools look for graphs
NEEDED = (GRAPH, "tokenizer.json", "tokenizer_config.json", "config.json")
# Plain names that mean a file of this folder on every system: no separators, drives, streams, Windows devices or
# hidden files.
FILE_NAME = re.compile(
    r"(?!(con|prn|aux|nul|com\d|lpt\d)(\.|$))[a-z0-9_]([a-z0-9_.-]{0,126}[a-z0-9_])?", re.ASCII | re.IGNORECASE
)
STATES = {
    "changed": "is not the file that was exported (its SHA-256 differs)",
    "missing": "is missing",
    "not a plain file": "is not a plain file of the folder (if it is a link, copy its target: cp -rL)",
    "unreadable": "cannot be read",
    "too large": "is larger than any such file that we know",
}
MAX_NESTING = 16  # objects within objects
MAX_GRAPH_BYTES = 2 << 30  # protobuf's own limit
REEXPORT_HINT = "export the checkpoint again (mlmkit export CHECKPOINT --output ARTIFACT)"
DYNAMIC_INT8 = "int8-dynamic"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", DYNAMIC_INT8)
CAPABILITY = re.compile(r"[0-9]{1,2}\.[0-9]\+?")
FLAVOURS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT for RTX"}


@dataclass(frozen=True)
class Profile:
    """The smallest, the usual and the largest size of each axis that a TensorRT plan is built for."""

    name: str
    batch: tuple[int, int, int]
    seq: tuple[int, int, int]
    masked: tuple[int, int, int]


@dataclass(frozen=True)
class TensorRT:
    """How the artifact's plan was built.

    `flavour` is a key of `FLAVOURS`; a plan runs on no other flavour or `version`. `targets` are compute capabilities:
    "9.0", or "12.0+" for that and later ones. Three fields are per profile: `layers` counts layers by the type that
    they write, `fused_attention` those that compute a whole attention, `scratch_mib` is the memory that an execution
    context needs besides the weights. `parity` is the report of the plan itself, measured on `gpu`; both are None until
    a GPU has run the plan.
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
    """The contents of `mlmkit.json`; docs/artifact.md describes every field.

    `files` maps each file's name to its SHA-256. `fingerprint` is that of the checkpoint's weights. With
    `sees_padding`, rows of different lengths must not share a batch (`mlmkit.model.sees_padding`). `parity` is the
    report of the export, in nats; `drift_allowed` means that it exceeds its bounds and the user accepted that.
    `calibration` describes the data that a lower precision was fitted to.
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


# ------------------------------------------------------------------ the folder


@dataclass(frozen=True)
class CheckedFile:
    """A file that the manifest lists, as it was when it was hashed.

    `state` is `ok` or a key of `STATES`. `content` is kept for the files in `NEEDED`, so that the hashed bytes are the
    bytes in use. The other files are large and opened again by path; `stamp` (device, inode, size, time of the last
    write) shows whether another file has replaced them since.
    """

    state: str
    content: bytes = b""
    stamp: tuple[int, ...] = ()


def is_artifact(folder: Path) -> bool:
    """Whether the folder has a manifest."""
    return (folder / MANIFEST).is_file()


def refuse_other_graphs(folder: Path) -> None:
    """Raise `UserError` for a folder that only holds graphs for other tools (`mlmkit export --layout transformers`)."""
    if any((folder / ONNX_FOLDER).glob("*.onnx")) and not any(folder.glob("*.safetensors*")):
        raise UserError(
            f"{folder} holds graphs for optimum and transformers.js ({ONNX_FOLDER}/), which mlmkit does not run: name "
            "the checkpoint that they were exported from, or its artifact"
        )


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder except the manifest and the model card, which its owner may edit."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name not in (MANIFEST, CARD)}


def weight_bytes(folder: Path) -> int:
    """The size of an artifact's graph with its weights, in bytes."""
    return sum(file.stat().st_size for file in folder.glob(f"{GRAPH}*"))


def open_files(folder: Path) -> tuple[Manifest, dict[str, CheckedFile]]:
    """Read the manifest and check every file that it lists.

    Raises `UserError` for a manifest that cannot be read and for a file that is missing, changed or not a plain file.
    """
    manifest = parse_manifest(folder)
    files = check_files(folder, manifest)
    for name, file in files.items():
        if file.state != "ok":
            raise UserError(f"{folder}: {name} {STATES[file.state]}: {REEXPORT_HINT}")
    return manifest, files


def read_manifest(folder: Path) -> Manifest:
    """The manifest, after checking every file. Raises `UserError` like `open_files`."""
    return open_files(folder)[0]


def check_files(folder: Path, manifest: Manifest) -> dict[str, CheckedFile]:
    """Read every file that the manifest lists once and compare its hash. Returns the files by name."""
    return {name: _check(folder / name, sha256) for name, sha256 in manifest.files.items()}


def refuse_changes(folder: Path, files: Mapping[str, CheckedFile]) -> None:
    """Raise `UserError` if a file was replaced since it was hashed. Call it after opening files by path."""
    for name, file in files.items():
        path = folder / name
        if not path.exists() or _stamp(path.stat()) != file.stamp:
            raise UserError(f"{folder}: {name} was replaced while the artifact was being loaded: run it again")


def _check(path: Path, expected: str) -> CheckedFile:
    if path.is_symlink() or (path.exists() and not path.is_file()):
        return CheckedFile("not a plain file")
    if not path.exists():
        return CheckedFile("missing")
    try:
        with path.open("rb") as file:
            stamp = _stamp(os.fstat(file.fileno()))
            if path.name not in NEEDED:
                content, digest = b"", hashlib.file_digest(file, "sha256")
            elif stamp[2] > (MAX_GRAPH_BYTES if path.name == GRAPH else largest_file(path.name)):
                return CheckedFile("too large")
            else:
                content = file.read()
                digest = hashlib.sha256(content)
    except OSError:
        return CheckedFile("unreadable")
    return CheckedFile("ok" if digest.hexdigest() == expected else "changed", content, stamp)


def _stamp(status: os.stat_result) -> tuple[int, ...]:
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def read_tokenizer(folder: Path, manifest: Manifest, files: Mapping[str, CheckedFile]) -> Tokenizer:
    """The artifact's tokenizer.

    Raises `UserError` if the tokenizer or `config.json` cannot be read or does not fit the manifest's vocabulary size
    and maximum length.
    """
    contents = {name: files[name].content for name in NEEDED}
    tokenizer, size = Tokenizer.from_folder(folder, contents), manifest.vocabulary_size
    if tokenizer.vocabulary_size > size:
        raise UserError(
            f"{folder}: the tokenizer has ids up to {tokenizer.vocabulary_size - 1} but the model's vocabulary "
            f"has {size}: {REEXPORT_HINT}"
        )
    try:
        config = json.loads(contents["config.json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder}: config.json cannot be read: {error}: {REEXPORT_HINT}") from None
    config_size = config.get("vocab_size", size) if isinstance(config, dict) else None
    if config_size != size:
        raise UserError(
            f"{folder}: config.json has a vocabulary of {reprlib.repr(config_size)} ids, the model has {size}: "
            f"{REEXPORT_HINT}"
        )
    # RoBERTa's table has 514 positions for 512 tokens; only its tokenizer knows the smaller number.
    limits = (tokenizer.limit, config.get("max_position_embeddings"))
    if (limit := min(limit for limit in (*limits, 1 << 31) if type(limit) is int)) < manifest.max_length:
        raise UserError(
            f"{folder}: {MANIFEST} allows rows of {manifest.max_length} tokens, but the model takes {limit}: "
            f"{REEXPORT_HINT}"
        )
    return tokenizer


# ------------------------------------------------------------------ the manifest


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest atomically. Write it last: a folder with a manifest is complete.

    Raises `CheckError` for a manifest that `parse_manifest` would refuse, for example with a figure that is not finite.
    """
    values = json.loads(json.dumps(asdict(manifest)))
    try:
        _decode(values)
    except ValueError as error:
        raise CheckError(f"the manifest cannot be written: {error}") from None
    write_record(folder / MANIFEST, values)


def parse_manifest(folder: Path) -> Manifest:
    """The manifest, without checking its files. Raises `UserError` if it is damaged or not of this format."""
    try:
        return _decode(read_record(folder / MANIFEST, REEXPORT_HINT))
    except ValueError as error:
        raise UserError(f"{folder}/{MANIFEST}: {error}: {REEXPORT_HINT}") from None


def report_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The entries of a report (parity, calibration) for display: a name in words and a formatted value each."""
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
    """Decode a manifest. Raises `ValueError` with the reason if it is not valid."""
    if values.get("format") != FORMAT:
        raise ValueError(f"format {reprlib.repr(values.get('format'))[:100]}; this mlmkit reads format {FORMAT}")
    _check_plain(values, MAX_NESTING)
    manifest: Manifest = _parse(Manifest, values, "")
    if manifest.precision not in PRECISIONS:
        raise ValueError(f"unknown precision {reprlib.repr(manifest.precision)}")
    if built := manifest.tensorrt:
        if built.flavour not in FLAVOURS:
            raise ValueError(f"unknown flavour of TensorRT {reprlib.repr(built.flavour)}")
        if not (PLAN in manifest.files and built.profiles and built.targets):
            raise ValueError(f"tensorrt without {PLAN}, profiles or targets")
        if (built.gpu is None) != (built.parity is None):
            raise ValueError("only one of tensorrt.gpu and tensorrt.parity is null")
        if wrong := [text for text in built.targets if not CAPABILITY.fullmatch(text)]:
            raise ValueError(f"invalid compute capability {reprlib.repr(wrong[0])}")
    if missing := [name for name in NEEDED if name not in manifest.files]:
        raise ValueError(f"does not list {missing[0]}")
    taken = {MANIFEST}  # names that differ only in case are one file on some systems
    for name in manifest.files:
        if not FILE_NAME.fullmatch(name) or name.casefold() in taken:
            raise ValueError(f"{reprlib.repr(name)} is not a plain file of the folder")
        taken.add(name.casefold())
    return manifest


def _check_plain(value: Any, levels: int) -> None:
    """Raise `ValueError` for valid JSON that cannot be displayed or computed with."""
    if levels == 0:
        raise ValueError("nested too deeply")
    if isinstance(value, str) and not value.isprintable():
        raise ValueError(f"{reprlib.repr(value)} has characters that cannot be printed")
    if isinstance(value, int | float) and not abs(value) < 1 << 63:  # false for NaN too
        raise ValueError("a number is not finite, or too large")
    if isinstance(value, dict):
        _check_plain([*value, *value.values()], levels)
    elif isinstance(value, list):
        for item in value:
            _check_plain(item, levels - 1)


def _parse(kind: Any, value: Any, name: str) -> Any:
    """Convert a JSON value to `kind`, a dataclass or the type of a field. Raises `ValueError` naming the field."""
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
    # `type`, not `isinstance`: True is an int to Python, but not a count
    if kind is Any or (type(value) is kind and not (kind is int and value not in range(1, 1 << 31))):
        return value
    raise ValueError(f"{reprlib.repr(name.rstrip('.'))} has a wrong type or value")
