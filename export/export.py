"""The export command's work, in order: load, write, prove, describe."""

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from transformers import AutoTokenizer

from mlmkit import __version__
from mlmkit.artifact import FORMAT, MANIFEST, Manifest, hash_files, write_manifest
from mlmkit.backends.onnx import OnnxBackend
from mlmkit.backends.torch import TorchBackend
from mlmkit.errors import CheckError
from mlmkit.export.onnx import OPSET, write_onnx
from mlmkit.export.parity import Parity, check_parity
from mlmkit.files import new_folder
from mlmkit.pydocs import topics

log = logging.getLogger(__name__)


def export(checkpoint: str, output: Path, *, texts: Sequence[str] = (), overwrite: bool = False) -> Parity:
    """Write the artifact folder `output` for a checkpoint folder or hub name, and return its parity report.

    `texts` is what parity is proven on; by default Python's own documentation. Nothing appears at `output` unless the
    proof holds. Raises `UserError` for an unusable checkpoint and `CheckError` when parity does not hold.
    """
    with new_folder(output, replaces=MANIFEST if overwrite else "") as folder:
        log.info("loading %s", checkpoint)
        reference = TorchBackend(checkpoint, "cpu")
        info = reference.info
        log.info("writing the ONNX graph")
        write_onnx(reference.model, folder / "model.onnx")
        AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
        reference.model.network.config.save_pretrained(folder)

        manifest = Manifest(
            format=FORMAT,
            files=hash_files(folder),
            fingerprint=info.fingerprint,
            architecture=info.architecture,
            vocabulary_size=info.vocabulary_size,
            max_length=info.max_length,
            precision=info.precision,
            opset=OPSET,
            top_k=info.top_k,
            sees_padding=info.sees_padding,
            parity={},
            drift_allowed=False,
            calibration=None,
            tensorrt=None,
            mlmkit_version=__version__,
        )
        # The engine is loaded as a user will load it, so the proof covers the manifest, the tokenizer and both graphs.
        write_manifest(folder, manifest)
        log.info("checking parity with ONNX Runtime on real text")
        engine = OnnxBackend(str(folder), "cpu")
        if engine.tokenizer.fingerprint != reference.tokenizer.fingerprint:
            raise CheckError("the saved tokenizer is not the one that was loaded; nothing was exported")
        parity = check_parity(reference, engine, texts or topics())
        if not parity.passed:
            raise CheckError(
                f"parity does not hold: log-probabilities differ by up to {parity.max_log_prob_difference:.2e} nats "
                f"(bound {parity.bound:.0e}) over {parity.masked} tokens; nothing was exported"
            )
        write_manifest(folder, replace(manifest, parity=parity.as_dict()))
    return parity
