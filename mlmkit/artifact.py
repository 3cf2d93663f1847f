"""The artifact's manifest, `mlmkit.json`: what the folder holds, and proof that it is still that.

Its format is read by the backends and written by `mlmkit.export`, so it stands below both.
"""

import json
from dataclasses import asdict, dataclass, fields, is_dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from mlmkit.errors import UserError
from mlmkit.files import file_sha256, sync

MANIFEST = "mlmkit.json"
FORMAT = 2
GRAPH, PLAN, SCORING_PLAN = "model.onnx", "model.plan", "scoring.plan"
AGAIN = "export the checkpoint again (mlmkit export CHECKPOINT --output ARTIFACT)"
DYNAMIC_INT8 = "int8-dynamic"
PRECISIONS = ("fp32", "fp16", "bf16", "int8", DYNAMIC_INT8)


@dataclass(frozen=True)
class Profile:
    """The smallest, the most usual and the largest size of each axis that a TensorRT plan is built for."""

    name: str
    batch: tuple[int, int, int]
    seq: tuple[int, int, int]
    masked: tuple[int, int, int]


@dataclass(frozen=True)
class TensorRT:
    """What the plans were built by and for: a plan is machine code, and runs on no other version and no other GPU.

    `version_compatible` and `hardware_compatible` plans are the exception. `layers` counts the layers by the type that
    they write. `parity` is the report of the plan itself. With `weights_stripped` the weights come from `model.onnx`.
    """

    version: str
    compute_capability: str
    gpu: str
    version_compatible: bool
    hardware_compatible: bool
    weights_stripped: bool
    profiles: list[Profile]
    layers: dict[str, int]
    parity: dict[str, Any]


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
    """SHA-256 of every file in the folder but the manifest."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Written last, and whole or not at all: a folder with a manifest is complete."""
    building = folder / f".{MANIFEST}"
    building.write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")
    sync(building)
    building.rename(folder / MANIFEST)


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check every file against it.

    Raises `UserError` for another format, a missing or changed file, or a name that leads out of the folder.
    """
    manifest = parse_manifest(folder)
    check_files(folder, manifest)
    return manifest


def parse_manifest(folder: Path) -> Manifest:
    """The manifest alone, its files unchecked. Raises `UserError` for what is not one of this format."""
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{MANIFEST} cannot be read ({error}): {AGAIN}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{folder}/{MANIFEST} is of format {found!r}, this mlmkit reads {FORMAT}: {AGAIN}")
    try:
        manifest: Manifest = _parse(Manifest, values, "")
    except ValueError as error:
        raise UserError(f"{folder}/{MANIFEST}: {error}: {AGAIN}") from None
    if manifest.precision not in PRECISIONS:
        raise UserError(f"{folder}/{MANIFEST}: no precision {manifest.precision!r}: {AGAIN}")
    return manifest


def check_files(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` unless every file that the manifest lists is a plain one of the folder, and unchanged."""
    for needed in (GRAPH, "tokenizer.json", "tokenizer_config.json", "config.json"):
        if needed not in manifest.files:
            raise UserError(f"{folder}/{MANIFEST} does not list {needed}: {AGAIN}")
    for name, expected in manifest.files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise UserError(f"{folder}/{MANIFEST}: {name!r} is not a plain file of the folder: {AGAIN}")
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing: {AGAIN}")
        if file_sha256(path) != expected:
            raise UserError(f"{folder}: {name} is not the file that was exported (its SHA-256 differs): {AGAIN}")


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
    if kind is Any or (type(value) is kind and not (kind is int and value <= 0)):
        return value
    raise ValueError(f"{name.rstrip('.')!r} is of a wrong type or value")
