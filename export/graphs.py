"""Operations on ONNX graphs that several modules need: walking, adding constants, saving. Needs no torch."""

import contextlib
import io
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, RemoveUnusedNodesPass

from mlmkit.artifact import GRAPH, Manifest, hash_files, write_manifest
from mlmkit.backends import Batch

# Larger weights go into a file of their own, which the runtime maps into memory. A protobuf file cannot exceed 2 GB.
EXTERNAL_DATA_BYTES = 64 << 20
SINGLE_FILE_BYTES = 2_000_000_000  # nearly protobuf's 2 GiB: the nodes take some of it


def reachable(starts: Iterable[ir.Node], step: Callable[[ir.Node], Iterable[ir.Node]]) -> list[ir.Node]:
    """The nodes that `step` leads to from `starts`, including `starts`, in the order of a depth-first walk."""
    reached, waiting = dict[ir.Node, None](), list(starts)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached[node] = None
            waiting.extend(step(node))
    return list(reached)


def add_constant(graph: ir.Graph, name: str, numbers: Any) -> ir.Value:
    """The graph's initializer of this name, created from `numbers` if it does not exist."""
    if name not in graph.initializers:
        graph.register_initializer(ir.val(name, const_value=ir.tensor(np.asarray(numbers), name=name)))
    return graph.initializers[name]


def feeds(names: Iterable[str], batch: Batch) -> dict[str, Any]:
    """The inputs of a graph that has inputs of these names: a batch's own, and `token_type_ids` of zeros."""
    values = {**batch._asdict(), "token_type_ids": np.zeros_like(batch.input_ids)}
    return {name: values[name] for name in names}


def save_graph(model: ir.Model, path: Path, *, single_file: bool = False) -> None:
    """Write a graph; large weights go beside it, into `model.onnx.data`.

    With `single_file` they stay in it, unless protobuf's limit forces them into `model.onnx_data`, where optimum and
    transformers.js look. Drops weights that no node reads, and the exporter's metadata: its stack traces contain paths
    of this machine and take two thirds of a small graph.
    """
    RemoveUnusedNodesPass()(model)
    ClearMetadataAndDocStringPass()(model)
    size = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)
    if size > (SINGLE_FILE_BYTES if single_file else EXTERNAL_DATA_BYTES):
        ir.save(model, path, external_data=f"{path.name}{'_' if single_file else '.'}data")
    else:  # weights that were read from another graph's data file would otherwise stay there
        ir.save(ir.external_data.load_to_model(model), path)


def replace_graph(model: ir.Model, path: Path) -> None:
    """Write a graph over the file that it was read from, although its weights may still be read from there."""
    with scratch_folder(path.parent) as folder:
        save_graph(model, folder / path.name)
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)
        for file in folder.iterdir():
            file.replace(path.parent / file.name)


@contextlib.contextmanager
def artifact_with(model: ir.Model, folder: Path, manifest: Manifest) -> Iterator[Path]:
    """Copy the artifact in `folder` with another graph and a manifest that fits it; the copy ends with the block."""
    with scratch_folder(folder) as copy:
        for name in manifest.files:
            if not name.startswith(GRAPH):
                shutil.copyfile(folder / name, copy / name)
        save_graph(model, copy / GRAPH)
        write_manifest(copy, replace(manifest, files=hash_files(copy)))
        yield copy


@contextlib.contextmanager
def scratch_folder(folder: Path) -> Iterator[Path]:
    """A folder within `folder` for the block. After a kill it goes with the unfinished artifact that it lies in."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        yield Path(scratch)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Silence torch's exporter and ONNX Runtime's quantizer, which print and warn about nothing a user can change."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(action="ignore"), contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        logging.disable(level)
