"""The command that shows and checks an artifact: inspect."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mlmkit.cli.options import PATH, JsonOption, argument, command, option_class
from mlmkit.console import print_json, print_table
from mlmkit.errors import CheckError

if TYPE_CHECKING:
    from mlmkit.artifact import TensorRT
    from mlmkit.inspection import Inspection

Rows = list[tuple[str, str]]


@option_class
class InspectOptions(JsonOption):
    artifact: Path = argument("Folder that mlmkit export wrote.", type=PATH)


@command(InspectOptions)
def inspect(options: InspectOptions) -> None:
    """Check ARTIFACT and show what can run it.

    Shows what ARTIFACT holds, compares its files with their digests, and lists the engines that can run it on this
    machine.

    Exit code 0 if ARTIFACT is exactly what was exported, 1 if it is damaged, 2 if it is not an artifact.
    """
    from mlmkit.inspection import inspect as run_inspection

    inspection = run_inspection(options.artifact)
    if options.as_json:
        print_json(_as_json(options.artifact, inspection))
    else:
        print_table(_rows(inspection))
    if inspection.problems:
        problems = f"{len(inspection.problems)} problems"
        raise CheckError(f"{options.artifact} is damaged ({problems}): export the checkpoint again")


def _as_json(artifact: Path, inspection: "Inspection") -> dict[str, Any]:
    return {
        "artifact": str(artifact),
        "sound": not inspection.problems,
        "problems": inspection.problems,
        "manifest": asdict(inspection.manifest),
        "files": inspection.files,
        "graph": inspection.graph and asdict(inspection.graph),
        "tokens": inspection.tokens,
        "engines": [asdict(engine) | {"runs": not engine.reason} for engine in inspection.engines],
    }


def _rows(inspection: "Inspection") -> Rows:
    from mlmkit.artifact import report_rows

    manifest = inspection.manifest
    rows = [
        ("architecture", f"{manifest.architecture}, vocabulary {manifest.vocabulary_size:,}"),
        ("at most", f"{manifest.max_length} tokens per text, {manifest.top_k} candidates per mask"),
        ("precision", f"{manifest.precision}, ONNX opset {manifest.opset}"),
    ]
    if manifest.sees_padding:
        rows.append(("padding", "changes its scores, so a batch holds rows of one length"))
    rows += [("fingerprint", manifest.fingerprint), ("exported by", f"mlmkit {manifest.mlmkit_version}")]
    rows += _section("parity, in nats", report_rows(manifest.parity) or [("no report", "")])
    if manifest.drift_allowed:
        rows.append(("  allowed drift", "parity is outside its bounds: exported with --allow-drift"))
    if manifest.calibration:
        rows += _section("calibration", report_rows(manifest.calibration))
    if manifest.tensorrt:
        rows += _section("TensorRT", _tensorrt(manifest.tensorrt))
    rows += _section("files", list(inspection.files.items()))
    problems = inspection.problems or ["none"]
    rows += zip(["problems", *[""] * (len(problems) - 1)], problems, strict=True)
    engines = [(f"{engine.backend} on {engine.device}", engine.reason or "yes") for engine in inspection.engines]
    return rows + _section("runs here", engines)


def _tensorrt(built: "TensorRT") -> Rows:
    from mlmkit.artifact import FLAVOURS, report_rows

    rows = [
        ("version", f"{FLAVOURS[built.flavour]} {built.version}"),
        ("compute capability", ", ".join(built.targets)),
    ]
    for profile in built.profiles:
        sizes = (f"{axis} {' / '.join(map(str, getattr(profile, axis)))}" for axis in ("batch", "seq", "masked"))
        types = ", ".join(f"{count} {kind}" for kind, count in built.layers.get(profile.name, {}).items())
        scratch = built.scratch_mib.get(profile.name)
        rows += [
            (f"profile {profile.name}", ", ".join(sizes)),
            ("  layers", types or "unknown"),
            ("  fused attention", str(built.fused_attention.get(profile.name, "none"))),
            ("  scratch memory", "unknown" if scratch is None else f"{scratch:,.0f} MiB"),
        ]
    if built.parity is None:
        return [*rows, ("proven on", "unproven: no GPU has run it")]
    return [*rows, ("proven on", str(built.gpu)), *report_rows(built.parity)]


def _section(title: str, rows: Rows) -> Rows:
    return [(title, ""), *((f"  {name}", value) for name, value in rows)]
