"""A checkpoint → an artifact.

TorchBackend    load the checkpoint, the reference of the proof
write_onnx      write its scoring graph, with tokenizer and configuration
convert         change the graph's precision
require_parity  load the artifact as a user would, and compare its scores with the reference
with_plan       build a TensorRT plan, if requested, and prove it where it can run
"""

import logging
from contextlib import ExitStack
from dataclasses import replace
from os import PathLike, fspath
from pathlib import Path

import onnx_ir as ir
from transformers import AutoTokenizer

from mlmkit import __version__
from mlmkit.artifact import FORMAT, GRAPH, MANIFEST, PRECISIONS, Manifest, hash_files, weight_bytes, write_manifest
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.backends.torch import TorchBackend
from mlmkit.errors import CheckError, UserError
from mlmkit.export.graphs import artifact_with
from mlmkit.export.onnx import OPSET, write_onnx
from mlmkit.export.parity import ProofText, calibration_batches, proof_text, require_calibration, require_parity
from mlmkit.export.precision import convert, emulate
from mlmkit.export.profiles import PlanOptions
from mlmkit.files import locate_model, new_folder
from mlmkit.pretrained import from_pretrained, save_config, save_tokenizer

log = logging.getLogger(__name__)


def export(
    checkpoint: str | PathLike[str],
    output: str | PathLike[str],
    *,
    precision: str = "fp32",
    text: ProofText | None = None,
    allow_drift: bool = False,
    plans: PlanOptions | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> Manifest:
    """Export a checkpoint folder or hub name to the artifact folder `output`; return the manifest.

    Parity is checked on `text`, by default the text that `proof_text` picks. fp16 and int8 are calibrated on every
    other document and checked on the rest. `plans` adds a TensorRT plan, which is proven if this machine can run it.
    With `trust_remote_code`, Python code that comes with the checkpoint runs, and weights may be in
    `pytorch_model.bin`; the artifact has no code.

    The folder appears only when everything succeeded. Raises `UserError` for a checkpoint that cannot be used, and
    `CheckError` if parity does not hold and `allow_drift` is not set.
    """
    if precision not in PRECISIONS:
        raise UserError(f"unknown precision {precision!r}: choose {', '.join(PRECISIONS)}")
    checkpoint, output = locate_model(fspath(checkpoint)), Path(output)
    text = text or proof_text(checkpoint)
    require_calibration(precision, text)
    with new_folder(output, replaces=MANIFEST if overwrite else "") as folder:
        log.info("loading %s", checkpoint)
        reference = TorchBackend(checkpoint, "cpu", trust_remote_code=trust_remote_code)
        info = reference.info
        if plans is not None:
            from mlmkit.export.tensorrt import plan_targets  # needs TensorRT

            plan_targets(info.architecture, precision, plans)  # fail now rather than after the export
        save_tokenizer(from_pretrained(AutoTokenizer, checkpoint, trust_remote_code=trust_remote_code), folder)
        save_config(reference.model.network.config, folder)
        log.info("writing the ONNX graph")
        write_onnx(reference.model, folder / GRAPH)
        size = weight_bytes(folder)
        if precision != "fp32":
            log.info("converting it to %s", precision)
        calibration = convert(folder / GRAPH, precision, calibration_batches(text, precision, reference, size))
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
            calibration=calibration,
            tensorrt=None,
            mlmkit_version=__version__,
        )
        write_manifest(folder, manifest)
        log.info("checking parity with ONNX Runtime on real text")
        with ExitStack() as stack:
            engine_folder = folder
            if precision == "bf16":  # ONNX Runtime's CPU provider has no bfloat16
                emulate(model := ir.load(folder / GRAPH), precision)
                engine_folder = stack.enter_context(artifact_with(model, folder, replace(manifest, precision="fp32")))
            engine = OnnxBackend(str(engine_folder), "cpu")
            if engine.tokenizer.fingerprint != reference.tokenizer.fingerprint:
                raise CheckError("the saved tokenizer differs from the loaded one; nothing was exported")
            parity = require_parity(reference, engine, text, precision, size, allow_drift=allow_drift)
        manifest = replace(manifest, parity=parity.as_dict(), drift_allowed=not parity.passed)
        write_manifest(folder, manifest)
        if plans is not None:
            from mlmkit.export.plans import with_plan  # needs TensorRT

            manifest = with_plan(folder, manifest, plans, reference, text, allow_drift=allow_drift)
    return manifest
