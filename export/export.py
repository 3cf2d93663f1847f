"""The export command's work, in order: load, write, change precision, prove, build plans, describe."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import onnx_ir as ir
from transformers import AutoTokenizer

from mlmkit import __version__
from mlmkit.artifact import FORMAT, GRAPH, MANIFEST, PRECISIONS, Manifest, hash_files, weight_bytes, write_manifest
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.backends.torch import TorchBackend
from mlmkit.corpus import tokenize
from mlmkit.errors import CheckError, UserError
from mlmkit.export.card import write_card
from mlmkit.export.graph_files import copy_artifact
from mlmkit.export.lowering import lower
from mlmkit.export.onnx import OPSET, write_onnx
from mlmkit.export.parity import BOUNDS, check_parity, parity_batches, require_parity
from mlmkit.export.precision import convert
from mlmkit.export.profiles import PlanOptions
from mlmkit.export.proof_text import FALLBACK, ProofText, proof_text
from mlmkit.files import locate_model, new_folder
from mlmkit.pretrained import from_pretrained, save_tokenizer

log = logging.getLogger(__name__)


def export(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    *,
    precision: str = "fp32",
    text: ProofText | None = None,
    allow_drift: bool = False,
    plans: PlanOptions | None = None,
    card: bool = False,
    results: Sequence[dict[str, Any]] = (),
    overwrite: bool = False,
) -> Manifest:
    """Write the artifact folder `output` for a checkpoint folder or hub name, and return its manifest.

    `text` is what parity is proven on, by default what `proof_text` finds. A precision that is fitted to text takes
    every other document for that, and is proven on the rest. With `plans`, a TensorRT plan is built too, and proven
    where this machine can run it. With `card` a model card is written, which shows `results` (`result.json`s) too.
    Nothing appears at `output` unless the proof holds, or the drift is allowed. Raises `UserError` for an
    unusable checkpoint and `CheckError` when parity does not hold.
    """
    if precision not in PRECISIONS:
        raise UserError(f"no precision {precision!r}: choose {', '.join(PRECISIONS)}")
    checkpoint, output = locate_model(fspath(checkpoint)), Path(output)
    text = text or proof_text(checkpoint)
    if precision == "int8" and text.name == FALLBACK:
        raise UserError("int8 needs scales measured on text like yours: name some with --text")
    with new_folder(output, replaces=MANIFEST if overwrite else "") as folder:
        log.info("loading %s", checkpoint)
        reference = TorchBackend(checkpoint, "cpu")
        info = reference.info
        if plans is not None:
            from mlmkit.export.tensorrt import plan_targets  # needs TensorRT

            plan_targets(info.architecture, precision, plans)
        log.info("writing the ONNX graph")
        write_onnx(reference.model, folder / GRAPH)
        save_tokenizer(from_pretrained(AutoTokenizer, checkpoint), folder)
        reference.model.network.config.save_pretrained(folder)

        fitted, proven = text.split(precision)
        size = weight_bytes(folder)
        with TemporaryDirectory() as temporary:
            engine_folder = folder
            if precision == "bf16":  # ONNX Runtime's CPU provider has no bfloat16: float32 that is rounded stands in
                rounded, engine_folder = ir.load(folder / GRAPH), Path(temporary) / "rounded"
                lower(rounded, precision, emulate=True)
                copy_artifact(folder, engine_folder, rounded)
            if precision != "fp32":
                log.info("changing it to %s", precision)
            batches = []
            if fitted:
                corpus = tokenize(fitted.texts, reference.tokenizer)
                batches = parity_batches(corpus, reference.tokenizer, info.max_length, size)
            facts = convert(folder / GRAPH, precision, batches)
            manifest = Manifest(
                format=FORMAT,
                files=hash_files(folder),
                fingerprint=info.fingerprint,
                architecture=info.architecture,
                vocabulary_size=info.vocabulary_size,
                max_length=info.max_length,
                precision=precision,
                opset=OPSET,
                top_k=info.top_k,
                sees_padding=info.sees_padding,
                parity={},
                drift_allowed=False,
                calibration=facts,
                tensorrt=None,
                mlmkit_version=__version__,
            )
            # The engine is loaded as a user will load it: the proof covers manifest, tokenizer and both graphs.
            write_manifest(folder, manifest)
            if engine_folder != folder:
                write_manifest(engine_folder, replace(manifest, precision="fp32", files=hash_files(engine_folder)))
            log.info("checking parity with ONNX Runtime on real text")
            engine = OnnxBackend(str(engine_folder), "cpu")
            if engine.tokenizer.fingerprint != reference.tokenizer.fingerprint:
                raise CheckError("the saved tokenizer is not the one that was loaded; nothing was exported")
            parity = check_parity(reference, engine, proven, BOUNDS[precision], size)
        require_parity(parity, allow_drift)
        manifest = replace(manifest, parity=parity.as_dict(), drift_allowed=not parity.passed)
        write_manifest(folder, manifest)
        if plans is not None:
            from mlmkit.export.plans import with_plans  # needs TensorRT

            manifest = with_plans(folder, manifest, plans, reference, text, allow_drift=allow_drift)
        if card:
            write_card(folder, manifest, checkpoint=checkpoint, results=results)
    return manifest
