"""Writing graphs with their weights. Needs no torch."""

import shutil
import tempfile
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from mlmkit.artifact import GRAPH

# Larger weights go to a file of their own, which the runtime maps instead of parsing; protobuf itself ends at 2 GB.
EXTERNAL_DATA_BYTES = 64 << 20


def save_graph(model: ir.Model, path: Path) -> None:
    """Write a graph, its weights beside it in `model.onnx.data` if they are large.

    Without weights that nothing reads any more, and without the exporter's notes: they hold stack traces with paths of
    this machine, and make up two thirds of a small graph.
    """
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > EXTERNAL_DATA_BYTES:
        ir.save(model, path, external_data=f"{path.name}.data")
    else:  # what was read from a file beside another graph would stay there
        ir.save(ir.external_data.load_to_model(model), path)


def replace_graph(model: ir.Model, path: Path) -> None:
    """Write a graph over the file that it was read from, whose weights it may still be reading."""
    with tempfile.TemporaryDirectory(dir=path.parent) as building:
        save_graph(model, Path(building) / path.name)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        for file in Path(building).iterdir():
            file.replace(path.parent / file.name)


def copy_artifact(folder: Path, target: Path, model: ir.Model) -> None:
    """Copy an artifact to `target` with another graph. Its manifest is the old one: the caller writes a new one."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns(f"{GRAPH}*"))
    save_graph(model, target / GRAPH)
