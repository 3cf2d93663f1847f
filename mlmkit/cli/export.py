"""The command that exports: a checkpoint to an artifact, and an artifact to what else serves it."""

import shlex
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlmkit.cli.options import json_option, overwrite_option
from mlmkit.console import print_json, say
from mlmkit.errors import UserError, require

if TYPE_CHECKING:
    from mlmkit.artifact import TensorRT

COUNT = click.IntRange(1, 2**31 - 1)
PRECISIONS = "fp32|fp16|bf16|int8|int8-dynamic"


@click.command()
@click.argument("checkpoint")
@click.option("--output", type=click.Path(path_type=Path), help="The artifact folder to write.")
@click.option("--precision", metavar=PRECISIONS, help="What it computes in. Default: fp32.")
@click.option("--text", type=click.Path(), help="Prove parity on this text. Default: the run's held-out one.")
@click.option("--allow-drift", is_flag=True, help="Export even what differs from the checkpoint beyond the bounds.")
@click.option("--trt", is_flag=True, help="Build a TensorRT plan too.")
@click.option(
    "--target", metavar="sm75|sm121", help="Build it for these cards alone, not for 8.0 to 8.9, 12.0 and later."
)
@click.option("--max-batch", type=COUNT, help="Rows that the plans take in one run. Default: 64.")
@click.option("--max-seq", type=COUNT, help="Tokens a row, in a full batch. Default: 512.")
@click.option("--max-masked", type=COUNT, help="Masked positions in one run. Default: 4096.")
@click.option("--prove", is_flag=True, help="Run the artifact CHECKPOINT's plan on this machine's GPU and prove it.")
@click.option(
    "--triton",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Write a model repository for Triton Inference Server, too or alone.",
)
@click.option("--model-card", is_flag=True, help="Write a README.md for the hub.")
@click.option("--result", "results", multiple=True, metavar="RESULT", help="An evaluation to show on it. Repeatable.")
@overwrite_option
@json_option
def export(
    checkpoint: str,
    output: Path | None,
    precision: str | None,
    text: str | None,
    allow_drift: bool,
    trt: bool,
    prove: bool,
    triton: Path | None,
    model_card: bool,
    results: tuple[str, ...],
    overwrite: bool,
    as_json: bool,
    **plan: Any,
) -> None:
    """Export CHECKPOINT to ONNX, proven equal to it.

    The proof is made on real text: the same masked tokens through both. Nothing is written unless log-probabilities
    agree: within 1e-4 in fp32, within what docs/export.md says in the other precisions.

    With --trt, CHECKPOINT may be an artifact: its plan is built without torch. TensorRT for RTX builds without a GPU,
    and a machine with one proves the plan with --prove. With --prove or --triton alone, CHECKPOINT is an artifact and
    --output is left out.
    """
    from mlmkit.artifact import MANIFEST, is_artifact, parse_manifest
    from mlmkit.backends import INSTALL_TENSORRT
    from mlmkit.files import refuse_existing

    from_artifact = is_artifact(Path(checkpoint))
    chosen: dict[str, Any] = {name: value for name, value in plan.items() if value}
    if prove:
        if not from_artifact:
            raise UserError(f"{checkpoint} is no artifact: --prove runs the plan of one")
        if output or precision or trt or triton or model_card or results or overwrite or chosen:
            raise UserError("--prove goes with --text, --allow-drift and --json only")
    if from_artifact:
        if not (trt or triton or prove):
            raise UserError(
                f"{checkpoint} is an artifact: name the checkpoint it came from, add a plan with --trt, or say --triton"
            )
        if precision or model_card or results:
            raise UserError("an artifact keeps its precision and gets no card: plans and --triton are made from it")
        if not (trt or prove) and (output or text or allow_drift):
            raise UserError("--triton alone reads an artifact as it is: leave out --output, --text and --allow-drift")
    if output is None and (trt or not from_artifact):
        raise UserError("say where the artifact goes: --output ARTIFACT")
    artifact = output or Path(checkpoint)
    if chosen and not trt:
        raise UserError(f"--{next(iter(chosen)).replace('_', '-')} is about a TensorRT plan: say --trt too")
    if results and not model_card:
        raise UserError("--result is shown on the model card: say --model-card too")
    if output:
        refuse_existing(output, MANIFEST if overwrite else "")
    if (trt or prove) and not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
        raise UserError(f"this needs TensorRT: {INSTALL_TENSORRT}")
    if trt:
        require("rtx", "onnx", "onnx_ir")
    if not from_artifact:
        require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
    if triton:
        require("train", "onnx_ir")
        from mlmkit.export.triton import check_repository

        check_repository(artifact.resolve().name, triton, overwrite=overwrite)
    common: dict[str, Any] = {"allow_drift": allow_drift, "overwrite": overwrite}
    if output or prove:
        from mlmkit.export.proof_text import proof_text

        common["text"] = proof_text(checkpoint, text)
    if trt:
        from mlmkit.export.profiles import PlanOptions

        common["plans"] = PlanOptions(**chosen)
    if prove:
        from mlmkit.export.prove import prove as run_proof

        manifest = run_proof(artifact, text=common["text"], allow_drift=allow_drift)
    elif output is None:
        manifest = parse_manifest(artifact)
    elif from_artifact:
        from mlmkit.export.plans import add_plans

        manifest = add_plans(Path(checkpoint), output, **common)
    else:
        from mlmkit.eval.stored import load_result
        from mlmkit.export.export import export as run_export

        manifest = run_export(
            checkpoint,
            output,
            precision=precision or "fp32",
            card=model_card,
            results=[load_result(Path(folder)).result for folder in results],
            **common,
        )
    models = None
    if triton:
        from mlmkit.export.triton import write_repository

        models = write_repository(artifact, triton, overwrite=overwrite)
    if as_json:
        print_json(
            {
                "artifact": str(artifact),
                "precision": manifest.precision,
                "parity": manifest.parity,
                "drift_allowed": manifest.drift_allowed,
                "tensorrt": asdict(manifest.tensorrt) if manifest.tensorrt else None,
                "triton_models": models,
            }
        )
        return
    from mlmkit.export.parity import parity_line

    if output:
        say(f"parity {parity_line(manifest.parity)}")
    say(f"artifact: {artifact}")
    if models:
        say(f"Triton's model repository: {triton}, with {' and '.join(models)}")
    if manifest.tensorrt and (trt or prove):
        for line in _plan_lines(artifact, manifest.tensorrt):
            say(line)


def _plan_lines(artifact: Path, built: "TensorRT") -> list[str]:
    """What was built for which cards, and whether it is proven."""
    from mlmkit.artifact import FLAVOURS
    from mlmkit.export.parity import parity_line

    layers = max((sum(types.values()) for types in built.layers.values()), default=0)
    fused, scratch = (max(by_profile.values(), default=0) for by_profile in (built.fused_attention, built.scratch_mib))
    cards = ", ".join(built.targets).replace("+", " and later")
    built_line = (
        f"plan: {FLAVOURS[built.flavour]} {built.version}, for GPUs of compute capability {cards}; {layers} layers per "
        f"profile, {fused or 'no'} fused attention, {scratch:,.0f} MiB of scratch memory"
    )
    if built.parity is not None:
        return [built_line, f"proven on {built.gpu}: {parity_line(built.parity)}"]
    command = f"mlmkit export {shlex.quote(str(artifact))} --prove"
    unproven = f"unproven until a GPU has run it: {command}, on a machine with one of these cards"
    return [built_line, f"{unproven}. Until then --backend auto takes ONNX Runtime"]
