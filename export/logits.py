"""A checkpoint → the Hub's ONNX layout: a graph of logits for optimum, transformers.js and plain ONNX Runtime.

write_graph     write token ids → logits, with tokenizer and configuration
convert         change the graph's precision
save_graph      write it where the clients look for it
require_parity  score with that file, and compare with the checkpoint
"""

import inspect
import logging
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import torch
from google.protobuf.message import DecodeError
from torch import Tensor, nn
from transformers import AutoTokenizer

from mlmkit.artifact import GRAPH, ONNX_FOLDER, weight_bytes
from mlmkit.backends import Batch, ModelInfo, Scored
from mlmkit.backends.torch import TorchBackend
from mlmkit.distributed import cores
from mlmkit.errors import CheckError, UserError, first_line
from mlmkit.export.graphs import feeds, save_graph, scratch_folder
from mlmkit.export.layout import GRAPH_NAMES, layout_folder, refuse_other_model
from mlmkit.export.onnx import write_graph
from mlmkit.export.parity import (
    ProofText,
    calibration_batches,
    proof_text,
    require_calibration,
    require_parity,
    row_groups,
)
from mlmkit.export.precision import convert
from mlmkit.files import locate_model
from mlmkit.model import MaskedLM, score_logits
from mlmkit.pretrained import from_pretrained, save_config, save_tokenizer
from mlmkit.tokenizer import Tokenizer

log = logging.getLogger(__name__)

AXES = ("batch_size", "sequence_length")  # as optimum names them; transformers.js can fix them by name
FINGERPRINT = "mlmkit.fingerprint"  # metadata of a graph: the weights that it is of, as in an artifact's manifest
LOGITS_BYTES = 1 << 30  # at once; the rows of a batch are run in groups that stay below


@dataclass(frozen=True)
class LogitsGraph:
    """What `export_transformers` wrote: the file, the names of its inputs, and the report of its parity, in nats."""

    path: Path
    precision: str
    inputs: tuple[str, ...]
    parity: dict[str, Any]


def export_transformers(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    *,
    precision: str = "fp32",
    text: ProofText | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> LogitsGraph:
    """Export a checkpoint folder or hub name to `output` as optimum and transformers.js expect it: see `layout`.

    The graph computes float32 logits `[batch, seq, vocabulary]`. Parity is checked as `mlmkit.export.export.export`
    does, on what ONNX Runtime computes with the file. Nothing is written unless it holds: raises `CheckError`, and
    `UserError` for a checkpoint or a folder that cannot be used. `trust_remote_code` is as in `export`.
    """
    checkpoint, output = locate_model(fspath(checkpoint)), Path(output)
    text = text or proof_text(checkpoint)
    require_calibration(precision, text)
    with layout_folder(checkpoint, output, precision, overwrite=overwrite) as folder:
        log.info("loading %s", checkpoint)
        reference = TorchBackend(checkpoint, "cpu", trust_remote_code=trust_remote_code)
        tokenizer = from_pretrained(AutoTokenizer, checkpoint, trust_remote_code=trust_remote_code)
        model, info = reference.model, reference.info
        save_tokenizer(tokenizer, folder)
        save_config(model.network.config, folder)
        refuse_other_model(checkpoint, output, folder)
        _refuse_other_weights(output / ONNX_FOLDER, GRAPH_NAMES[precision], checkpoint, info.fingerprint)
        if Tokenizer.from_folder(folder).fingerprint != reference.tokenizer.fingerprint:
            raise CheckError("the saved tokenizer differs from the loaded one; nothing was exported")
        graph, inputs = folder / ONNX_FOLDER / GRAPH_NAMES[precision], _inputs(model, tokenizer)
        graph.parent.mkdir()
        with scratch_folder(folder) as scratch:
            log.info("writing the ONNX graph")
            write_graph(model, scratch / GRAPH, Logits(model), inputs, ["logits"], axes=AXES)
            size = weight_bytes(scratch)
            batches = calibration_batches(text, precision, reference, size)
            # Calibration holds the logits several times: batches of eight rows took 23 GB for BERT-base.
            convert(scratch / GRAPH, precision, [row for batch in batches for row in row_groups(batch, 1)])
            finished = ir.load(scratch / GRAPH)
            finished.metadata_props[FINGERPRINT] = info.fingerprint
            save_graph(finished, graph, single_file=True)
        log.info("checking parity with ONNX Runtime on real text")
        engine = LogitsBackend(graph, reference.tokenizer, replace(info, precision=precision))
        parity = require_parity(reference, engine, text, precision, size, allow_drift=None)
    return LogitsGraph(output / ONNX_FOLDER / graph.name, precision, inputs, parity.as_dict())


def _refuse_other_weights(graphs: Path, replaced: str, checkpoint: str, fingerprint: str) -> None:
    """Raise `UserError` if a graph in `graphs` is of other weights, except for `replaced` and those of other tools."""
    for path in sorted(graphs.glob("*.onnx")):
        try:
            if path.name != replaced and ir.load(path).metadata_props.get(FINGERPRINT, fingerprint) != fingerprint:
                raise UserError(f"{path} has other weights than {checkpoint}: delete it, or choose another folder")
        except DecodeError:
            raise UserError(f"{path} is not an ONNX graph: delete it, or choose another folder") from None


class Logits(nn.Module):
    """A masked LM as a function of token ids, with logits `[batch, seq, vocabulary]`."""

    def __init__(self, model: MaskedLM) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None) -> Tensor:
        types = {} if token_type_ids is None else {"token_type_ids": token_type_ids}
        return self.model.dense_logits(input_ids=input_ids, attention_mask=attention_mask, **types)


def _inputs(model: MaskedLM, tokenizer: Any) -> tuple[str, ...]:
    """The graph's inputs: what the tokenizer gives and the model reads.

    RoBERTa's table has one type, DeBERTa's none, and XLM would take the types for ids of its vocabulary: without the
    input, no client can pass a type that the model does not have.
    """
    takes_types = "token_type_ids" in inspect.signature(model.network.forward).parameters
    has_types = takes_types and getattr(model.network.config, "type_vocab_size", 0) > 1
    types = ["token_type_ids"] if has_types and "token_type_ids" in tokenizer.model_input_names else []
    return ("input_ids", "attention_mask", *types)


class LogitsBackend:
    """Scores with a graph of logits, run by ONNX Runtime on the CPU with its default optimisations, as others run it.

    Raises `CheckError` if ONNX Runtime cannot run a batch.
    """

    name, device, manifest = "onnx", "cpu", None

    def __init__(self, graph: Path, tokenizer: Tokenizer, info: ModelInfo) -> None:
        self.tokenizer, self.info = tokenizer, info
        options = ort.SessionOptions()
        options.log_severity_level, options.intra_op_num_threads = 4, cores()
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        self._inputs = [value.name for value in self._session.get_inputs()]

    def score(self, batch: Batch) -> Scored:
        order = np.argsort(batch.positions, kind="stable")
        ordered = batch._replace(positions=batch.positions[order], targets=batch.targets[order])
        row_bytes = 4 * batch.input_ids.shape[1] * self.info.vocabulary_size
        scored = map(self._score, row_groups(ordered, max(LOGITS_BYTES // row_bytes, 1)))
        return Scored(*(np.concatenate(values)[np.argsort(order)] for values in zip(*scored, strict=True)))

    def _score(self, batch: Batch) -> Scored:
        try:
            (output,) = self._session.run(["logits"], feeds(self._inputs, batch))
        except Exception as error:  # onnxruntime's own exceptions share no public base
            raise CheckError(f"ONNX Runtime failed on the graph of logits: {first_line(error)}") from error
        logits = np.asarray(output).reshape(-1, self.info.vocabulary_size)[batch.positions]
        scores = score_logits(torch.from_numpy(logits), torch.from_numpy(batch.targets), self.info.top_k)
        return Scored(*(values.numpy() for values in scores))
