"""The command that exports a checkpoint to an artifact, and an artifact to TensorRT plans or for Triton: export."""

import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from mlmkit.cli.options import PATH, JsonOption, TrustOption, argument, command, option, option_class, switch
from mlmkit.console import print_json, say

if TYPE_CHECKING:
    from mlmkit.artifact import TensorRT

COUNT = click.IntRange(1, 2**31 - 1)


@option_class
class PlanArguments:
    """The sizes and the GPUs of a TensorRT plan."""

    heading = "TensorRT plan, for --trt"
    target: str | None = option(
        "--target",
        "Build the plan for this GPU only.",
        shown_default="compute capabilities 8.0 to 8.9, 12.0 and later",
        metavar="sm75|sm121",
    )
    max_batch: int | None = option("--max-batch", "Rows per run.", shown_default=64, type=COUNT, metavar="N")
    max_seq: int | None = option(
        "--max-seq", "Tokens per row in a full batch.", shown_default=512, type=COUNT, metavar="N"
    )
    max_masked: int | None = option(
        "--max-masked", "Masked positions per run.", shown_default=4096, type=COUNT, metavar="N"
    )


@option_class
class ExportOptions(TrustOption, PlanArguments, JsonOption):
    checkpoint: str = argument(
        "Checkpoint (a folder or a Hugging Face Hub name) or folder of a training run; with --trt, --prove and "
        "--triton also an artifact."
    )
    output: Path | None = option(
        "--output", "Folder to write. Required, except with --prove or --triton alone.", type=PATH, metavar="OUTPUT"
    )
    precision: str | None = option(
        "--precision", "Precision of the graph.", shown_default="fp32", metavar="fp32|fp16|bf16|int8|int8-dynamic"
    )
    layout: str = option(
        "--layout",
        "An artifact of mlmkit, or the files that optimum and transformers.js load.",
        type=click.Choice(["mlmkit", "transformers"]),
        metavar="mlmkit|transformers",
        default="mlmkit",
    )
    text: str | None = option(
        "--text",
        "Text for the proof, and for calibration in int8.",
        shown_default="the run's held-out text",
        type=click.Path(),
        metavar="FILE",
    )
    allow_drift: bool = switch("--allow-drift", "Export even if the artifact's scores are outside the bounds.")
    trt: bool = switch("--trt", "Build a TensorRT plan too.")
    prove: bool = switch("--prove", "Prove the artifact's TensorRT plan by running it on this machine's GPU.")
    triton: Path | None = option(
        "--triton", "Write a model repository for Triton Inference Server to this folder.", type=PATH, metavar="DIR"
    )
    overwrite: bool = switch("--overwrite", "Replace an existing artifact or graph.")


@command(ExportOptions)
def export(options: ExportOptions) -> None:
    """Export CHECKPOINT to ONNX, with a proof.

    \b
    For example:
      mlmkit export run/model --output artifact
      mlmkit export run/model --output artifact-int8 --precision int8
      mlmkit export artifact --prove

    The proof scores the same masked tokens of real text with CHECKPOINT and with the graph. Nothing is written unless
    their log-probabilities agree: within 1e-4 in fp32, within the bounds of docs/export.md in the other precisions.

    With --trt, CHECKPOINT may be an artifact: its plan is built without torch. TensorRT for RTX builds plans without a
    GPU; --prove proves them on a machine with one. With only --prove or --triton, CHECKPOINT is an artifact, and there
    is no --output.

    --layout transformers writes config.json, the tokenizer and onnx/model.onnx (model_fp16.onnx in fp16, and so on), a
    graph of logits under the same proof. An existing folder of the same model gets the graph added.
    """
    from mlmkit.export.request import ExportRequest

    values = {name: value for name, value in vars(options).items() if value and name != "as_json"}
    plan = {name: values.pop(name) for name in PlanArguments.__annotations__ if name in values}
    request = ExportRequest(plan=plan, **values)
    request.check()
    if request.layout == "transformers":
        _export_transformers(options, request.artifact)
        return
    manifest, models = request.run()
    artifact = request.artifact
    if options.as_json:
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


def _export_transformers(options: ExportOptions, output: Path) -> None:
    from mlmkit.export.logits import export_transformers
    from mlmkit.export.parity import parity_line, proof_text

    graph = export_transformers(
        options.checkpoint,
        output,
        precision=options.precision or "fp32",
        text=proof_text(options.checkpoint, options.text),
        overwrite=options.overwrite,
        trust_remote_code=options.trust_remote_code,
    )
    if options.as_json:
        print_json(asdict(graph) | {"path": str(graph.path)})
        return
    say(f"parity {parity_line(graph.parity)}")
    say(f"graph: {graph.path} (inputs: {', '.join(graph.inputs)}; output: logits)")


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
