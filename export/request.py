"""A request of `mlmkit export`: the checks of its options, and the calls that do the work.

No large package is imported before `run`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mlmkit.artifact import MANIFEST, Manifest, is_artifact, parse_manifest
from mlmkit.errors import UserError, require
from mlmkit.export.layout import check_layout
from mlmkit.export.profiles import PlanOptions
from mlmkit.files import locate_model, refuse_existing

OF_BOTH_LAYOUTS = ("checkpoint", "output", "precision", "text", "overwrite", "layout", "trust_remote_code")


@dataclass(frozen=True)
class ExportRequest:
    """The options of the command; what was not given is None, False or empty.

    `plan` holds the arguments of `PlanOptions` that were given.
    """

    checkpoint: str
    output: Path | None = None
    precision: str | None = None
    text: str | None = None
    allow_drift: bool = False
    trt: bool = False
    plan: Mapping[str, Any] = field(default_factory=dict)
    prove: bool = False
    triton: Path | None = None
    overwrite: bool = False
    layout: str = "mlmkit"
    trust_remote_code: bool = False

    @property
    def artifact(self) -> Path:
        """The artifact that is written, proven or converted."""
        return self.output or Path(self.checkpoint)

    def check(self) -> None:
        """Raise `UserError` for options that contradict each other, paths that exist and packages that are missing."""
        if self.layout == "transformers":
            self._check_transformers()
            return
        from_artifact = is_artifact(Path(self.checkpoint))
        if from_artifact and self.trust_remote_code:
            raise UserError(f"{self.checkpoint} is an artifact, which has no code: leave out --trust-remote-code")
        if self.prove:
            others = (self.output, self.precision, self.trt, self.triton, self.plan)
            if not from_artifact:
                raise UserError(f"{self.checkpoint} is not an artifact: --prove runs an artifact's plan")
            if any(others) or self.overwrite:
                raise UserError("--prove can be combined with --text, --allow-drift and --json only")
        elif from_artifact:
            if not (self.trt or self.triton):
                raise UserError(
                    f"{self.checkpoint} is an artifact: add a plan with --trt or write a Triton repository with "
                    "--triton, or name the checkpoint it was exported from"
                )
            if self.precision:
                raise UserError("--precision needs a checkpoint, not an artifact")
            if not self.trt and (self.output or self.text or self.allow_drift):
                raise UserError("--triton reads the artifact as it is: omit --output, --text and --allow-drift")
        if self.output is None and (self.trt or not from_artifact):
            raise UserError("name the artifact folder to write: --output ARTIFACT")
        if self.plan and not self.trt:
            raise UserError(f"--{next(iter(self.plan)).replace('_', '-')} applies to a TensorRT plan: add --trt")
        if self.output:
            refuse_existing(self.output, MANIFEST if self.overwrite else "")
        if (self.trt or self.prove) and not (find_spec("tensorrt") or find_spec("tensorrt_rtx")):
            from mlmkit.backends import INSTALL_TENSORRT

            raise UserError(f"this needs TensorRT: {INSTALL_TENSORRT}")
        if self.trt:
            require("rtx", "onnx", "onnx_ir")
        if not from_artifact:
            require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")
        if self.triton:
            require("train", "onnx_ir")
            from mlmkit.export.triton import check_repository

            check_repository(self.artifact.resolve().name, self.triton, overwrite=self.overwrite)

    def _check_transformers(self) -> None:
        if others := [name for name, value in vars(self).items() if value and name not in OF_BOTH_LAYOUTS]:
            name = next(iter(self.plan)) if others[0] == "plan" else others[0]
            raise UserError(f"--{name.replace('_', '-')} does not apply to --layout transformers: leave it out")
        if self.output is None:
            raise UserError("name the folder to write: --output DIR")
        check_layout(locate_model(self.checkpoint), self.output, self.precision or "fp32", overwrite=self.overwrite)
        require("train", "torch", "transformers", "onnx", "onnxscript", "safetensors")

    def run(self) -> tuple[Manifest, list[str] | None]:
        """Do the work, after `check`; return the artifact's manifest and the names of the Triton models written.

        Raises as `mlmkit.export.export.export` does.
        """
        manifest, models = self._write_artifact(), None
        if self.triton:
            from mlmkit.export.triton import write_repository

            models = write_repository(self.artifact, self.triton, overwrite=self.overwrite)
        return manifest, models

    def _write_artifact(self) -> Manifest:
        if self.output is None and not self.prove:
            return parse_manifest(self.artifact)
        from mlmkit.export.parity import proof_text

        common: dict[str, Any] = {"text": proof_text(self.checkpoint, self.text), "allow_drift": self.allow_drift}
        if self.output is None:
            from mlmkit.export.plans import prove_plan

            return prove_plan(self.artifact, **common)
        common["overwrite"] = self.overwrite
        plans = PlanOptions(**self.plan) if self.trt else None
        if plans and is_artifact(Path(self.checkpoint)):
            from mlmkit.export.plans import add_plan

            return add_plan(Path(self.checkpoint), self.output, plans=plans, **common)
        from mlmkit.export.export import export

        return export(
            self.checkpoint,
            self.output,
            precision=self.precision or "fp32",
            plans=plans,
            trust_remote_code=self.trust_remote_code,
            **common,
        )
