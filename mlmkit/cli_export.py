"""The command that exports: a checkpoint to an artifact."""

from itertools import islice
from pathlib import Path

import click

from mlmkit.cli_options import json_option, overwrite_option, print_json
from mlmkit.errors import UserError, require

DOCUMENTS = 256  # of --text: half to fit a precision to, half to prove it on


@click.command()
@click.argument("checkpoint")
@click.option("--output", type=click.Path(path_type=Path), required=True, help="The artifact folder to write.")
@click.option(
    "--precision",
    default="fp32",
    show_default=True,
    metavar="fp32|fp16|bf16|int8|int8-dynamic",
    help="What it computes in.",
)
@click.option(
    "--text", type=click.Path(), help="Prove parity, and fit int8, on this text file. Default: Python's docs."
)
@click.option(
    "--calibration", default="percentile", show_default=True, metavar="percentile|entropy", help="How int8 is scaled."
)
@click.option(
    "--allow-drift", is_flag=True, help="Export even what differs from the checkpoint by more than the bounds."
)
@overwrite_option
@json_option
def export(
    checkpoint: str,
    output: Path,
    precision: str,
    text: str | None,
    calibration: str,
    allow_drift: bool,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Export CHECKPOINT to ONNX, proven equal to it.

    The proof is made on real text: the same masked tokens through both.

    Nothing is written unless the log-probabilities agree: within 1e-4 in fp32, within what docs/export.md says in the
    others.
    """
    require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    from mlmkit.artifact import MANIFEST
    from mlmkit.documents import Source, read_documents
    from mlmkit.export.export import export as run_export
    from mlmkit.export.parity import parity_line
    from mlmkit.files import refuse_existing

    refuse_existing(output, MANIFEST if overwrite else "")
    texts = list(islice(read_documents(Source(text)), DOCUMENTS)) if text else []
    if text and not texts:
        raise UserError(f"{text}: no documents in it")
    manifest = run_export(
        checkpoint,
        output,
        precision=precision,
        texts=texts,
        calibration=calibration,
        allow_drift=allow_drift,
        overwrite=overwrite,
    )
    if as_json:
        print_json({"artifact": str(output), "precision": manifest.precision, "parity": manifest.parity})
        return
    click.echo(f"parity {parity_line(manifest.parity)}")
    click.echo(f"artifact: {output}")
