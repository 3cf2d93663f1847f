"""The command that exports: a checkpoint to an artifact, and an artifact to what else serves it."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlmkit.cli.options import json_option, overwrite_option
from mlmkit.console import print_json, say

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
    as_json: bool,
    target: str | None,
    max_batch: int | None,
    max_seq: int | None,
    max_masked: int | None,
    **options: Any,
) -> None:
    """Export CHECKPOINT to ONNX, proven equal to it.

    The proof is made on real text: the same masked tokens through both. Nothing is written unless log-probabilities
    agree: within 1e-4 in fp32, within what docs/export.md says in the other precisions.

    With --trt, CHECKPOINT may be an artifact: its plan is built without torch. TensorRT for RTX builds without a GPU,
    and a machine with one proves the plan with --prove. With --prove or --triton alone, CHECKPOINT is an artifact and
    --output is left out.
    """
    from mlmkit.export.request import ExportRequest

    sizes = {"target": target, "max_batch": max_batch, "max_seq": max_seq, "max_masked": max_masked}
    request = ExportRequest(plan={name: value for name, value in sizes.items() if value}, **options)
    request.check()
    evaluations = []
    if request.results:
        from mlmkit.eval.stored import load_result

        evaluations = [load_result(Path(folder)).result for folder in request.results]
    manifest, models = request.run(evaluations)
    artifact = request.artifact
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

    if request.output:
        say(f"parity {parity_line(manifest.parity)}")
    say(f"artifact: {artifact}")
    if models:
        say(f"Triton's model repository: {request.triton}, with {' and '.join(models)}")
    if manifest.tensorrt and (request.trt or request.prove):
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
