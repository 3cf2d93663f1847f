"""The artifact's manifest, `mlmkit.json`: what the folder holds, and proof that it is still that.

Its format is read by the backends and written by `mlmkit.export`, so it stands below both.
"""

import json
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mlmkit.errors import UserError
from mlmkit.files import file_sha256

MANIFEST = "mlmkit.json"
FORMAT = 1


@dataclass(frozen=True)
class Manifest:
    """`files` maps each file's name to its SHA-256. `fingerprint` is that of the checkpoint's weights.

    `sees_padding`: rows of different lengths must not share a batch (see `mlmkit.model.sees_padding`).
    `parity` is the report that the export made, in natural-log units; `tensorrt` describes the plan, if there is one.
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
    tensorrt: dict[str, Any] | None
    mlmkit_version: str


def is_artifact(folder: Path) -> bool:
    """Whether the folder claims to be an artifact."""
    return (folder / MANIFEST).is_file()


def hash_files(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in the folder but the manifest."""
    return {path.name: file_sha256(path) for path in sorted(folder.iterdir()) if path.name != MANIFEST}


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Written last: a folder with a manifest is complete."""
    (folder / MANIFEST).write_text(json.dumps(asdict(manifest), indent=2) + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest and check every file against it.

    Raises `UserError` for another format, a missing or changed file, or a name that leads out of the folder.
    """
    again = "export the checkpoint again (mlmkit export CHECKPOINT --output ARTIFACT)"
    try:
        values = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder}/{MANIFEST} cannot be read ({error}): {again}") from None
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else type(values).__name__
        raise UserError(f"{folder}/{MANIFEST} is of format {found!r}, this mlmkit reads {FORMAT}: {again}")
    expected = {item.name: item.type for item in fields(Manifest)}
    for name, kind in expected.items():
        if name not in values or not _has_type(values[name], kind):
            raise UserError(f"{folder}/{MANIFEST}: {name!r} is missing or of a wrong type: {again}")
    manifest = Manifest(**{name: values[name] for name in expected})
    _check_files(folder, manifest.files, again)
    return manifest


def _has_type(value: object, kind: Any) -> bool:
    if kind is int:
        return type(value) is int and value > 0
    if kind in (str, bool):
        return isinstance(value, kind)
    if kind == dict[str, str]:
        return isinstance(value, dict) and all(isinstance(item, str) for item in value.values())
    return isinstance(value, dict) or (value is None and kind == dict[str, Any] | None)


def _check_files(folder: Path, files: dict[str, str], again: str) -> None:
    for needed in ("model.onnx", "tokenizer.json", "tokenizer_config.json", "config.json"):
        if needed not in files:
            raise UserError(f"{folder}/{MANIFEST} does not list {needed}: {again}")
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or path.is_symlink():
            raise UserError(f"{folder}/{MANIFEST}: {name!r} is not a plain file of the folder: {again}")
        if not path.is_file():
            raise UserError(f"{folder}: {name} is missing: {again}")
        if file_sha256(path) != expected:
            raise UserError(f"{folder}: {name} is not the file that was exported (its SHA-256 differs): {again}")
