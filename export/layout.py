"""The Hub's ONNX layout: `config.json`, the tokenizer's files, and `onnx/` with one graph per precision.

optimum, transformers.js and the Hub expect it. It may lie in a checkpoint's own folder, beside `model.safetensors`.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from mlmkit.artifact import ONNX_FOLDER, is_artifact
from mlmkit.errors import UserError
from mlmkit.files import atomic, content, locked, new_folder, sweep, sync

# transformers.js derives the name from its `dtype` (fp32, fp16, int8 or q8), optimum writes the first and the last.
GRAPH_NAMES = {
    "fp32": "model.onnx",
    "fp16": "model_fp16.onnx",
    "int8": "model_int8.onnx",
    "int8-dynamic": "model_quantized.onnx",
}


def check_layout(checkpoint: str, output: Path, precision: str, *, overwrite: bool) -> None:
    """Raise `UserError` now rather than after an export if `layout_folder` would refuse its arguments."""
    if precision not in GRAPH_NAMES:
        known = ", ".join(GRAPH_NAMES)
        raise UserError(f"this layout has no precision {precision!r} (its clients lack bfloat16): choose {known}")
    if is_artifact(Path(checkpoint)):
        raise UserError(f"{checkpoint} is an artifact: name the checkpoint it was exported from")
    if is_artifact(output):
        raise UserError(f"{output} is an artifact, which has a graph of its own: choose another folder")
    if not _is_filled(output):
        return
    graphs = output / ONNX_FOLDER
    if os.path.lexists(graphs) and not graphs.is_dir():
        raise UserError(f"{graphs} exists and is not a folder: choose another folder")
    if any(output.glob("*.safetensors*")) and not _is_same(checkpoint, output):
        raise UserError(f"{output} has weights of its own: name it as CHECKPOINT too, or choose another folder")
    graph = graphs / GRAPH_NAMES[precision]
    if graph.exists() and not overwrite:
        raise UserError(f"{graph} exists: replace it with --overwrite")
    for name in ("config.json", "tokenizer.json"):
        if not (output / name).is_file():
            raise UserError(f"{output} exists and has no {name}: choose another folder")


@contextmanager
def layout_folder(checkpoint: str, output: Path, precision: str, *, overwrite: bool) -> Iterator[Path]:
    """Yield a folder for a checkpoint's configuration, tokenizer and `onnx/` with the graph of one precision.

    When the block ends, it becomes `output` atomically, or if that exists, its graph moves into `output`: atomically if
    its weights are in it; a kill between weights and graph leaves no graph of this precision. Raises `UserError` for
    another `output` than the checkpoint's folder or a layout of it, and for a graph that exists, unless told to
    `overwrite` it.
    """
    check_layout(checkpoint, output, precision, overwrite=overwrite)
    output = output.resolve()
    if not _is_filled(output):
        with new_folder(output) as folder:
            yield folder
        return
    graphs, name = output / ONNX_FOLDER, GRAPH_NAMES[precision]
    try:
        with locked(output):
            sweep(output, age=0)  # what a killed export left; no other can run now
            # The folder that is yielded gets a temporary name beside onnx/, and with `keep` it does not replace onnx/.
            with atomic(graphs, folder=True, keep=True) as folder:
                yield folder
                graphs.mkdir(exist_ok=True)
                written = sorted((folder / ONNX_FOLDER).iterdir(), reverse=True)  # weights before their graph
                if len(written) > 1 or (graphs / f"{name}_data").exists():
                    (graphs / name).unlink(missing_ok=True)  # a kill must not leave it with other weights
                    (graphs / f"{name}_data").unlink(missing_ok=True)
                for file in written:
                    sync(file)
                    file.replace(graphs / file.name)
                sync(graphs)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror or error}") from error


def refuse_other_model(checkpoint: str, output: Path, folder: Path) -> None:
    """Raise `UserError` if `output` exists with another configuration or tokenizer than those written to `folder`.

    A checkpoint's own folder keeps its files, as they are what was loaded.
    """
    if not _is_filled(output) or _is_same(checkpoint, output):
        return
    for file in filter(Path.is_file, folder.iterdir()):
        other = output / file.name
        if not (other.is_file() and other.read_bytes() == file.read_bytes()):
            raise UserError(f"{other} is not the {file.name} of {checkpoint}: choose another folder")


def _is_filled(folder: Path) -> bool:
    return folder.is_dir() and bool(content(folder))


def _is_same(checkpoint: str, folder: Path) -> bool:
    return Path(checkpoint).is_dir() and folder.samefile(checkpoint)
