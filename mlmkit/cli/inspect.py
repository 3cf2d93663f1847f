"""The command that shows an artifact and checks it."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mlmkit.cli.options import json_option
from mlmkit.console import print_json, printable, say
from mlmkit.errors import CheckError

if TYPE_CHECKING:
    from mlmkit.artifact import TensorRT
    from mlmkit.inspection import Inspection


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@json_option
def inspect(artifact: Path, as_json: bool) -> None:
    """Show ARTIFACT, check its files, and say what runs it here.

    Exit code 0 if it is what was exported, 1 if it is damaged, 2 if it is no artifact.
    """
    from mlmkit.inspection import inspect as run_inspection

    found = run_inspection(artifact)
    if as_json:
        print_json(_as_json(artifact, found))
    else:
        for line in _lines(found):
            say(line)
    if found.problems:
        raise CheckError(f"{artifact} is damaged ({len(found.problems)} problems): export the checkpoint again")


def _as_json(artifact: Path, found: "Inspection") -> dict[str, Any]:
    graph = found.graph and asdict(found.graph) | {"external": sorted(found.graph.external)}
    return {
        "artifact": str(artifact),
        "sound": not found.problems,
        "problems": found.problems,
        "manifest": asdict(found.manifest),
        "files": found.files,
        "graph": graph,
        "tokens": found.tokens,
        "engines": [asdict(engine) | {"runs": not engine.reason} for engine in found.engines],
    }


def _lines(found: "Inspection") -> list[str]:
    manifest, graph = found.manifest, found.graph
    rows = {
        "architecture": f"{manifest.architecture}, vocabulary {manifest.vocabulary_size:,}",
        "at most": f"{manifest.max_length} tokens a text, {manifest.top_k} candidates a mask",
        "precision": f"{manifest.precision}, ONNX opset {manifest.opset}",
        "padding": "changes its scores, so a batch holds rows of one length" if manifest.sees_padding else "",
        "fingerprint": manifest.fingerprint,
        "exported by": f"mlmkit {manifest.mlmkit_version}",
    }
    lines = [_row(name, value) for name, value in rows.items() if value]
    lines += _section("parity with the checkpoint, in nats", _report(manifest.parity) or ["no report"])
    if manifest.drift_allowed:
        lines.append("  its bounds do not hold: exported with --allow-drift")
    if manifest.calibration:
        lines += _section("calibration", _report(manifest.calibration))
    if manifest.tensorrt:
        lines += _section("TensorRT", _tensorrt(manifest.tensorrt))
    lines += _section("files", [_row(printable(name), state) for name, state in found.files.items()])
    if graph:
        nodes = f"{sum(graph.operators.values()):,} nodes of {len(graph.operators)} types"
        lines += _section("graph", [f"{nodes}, weights in {', '.join(sorted(graph.external)) or 'the same file'}"])
    lines += _section("problems", found.problems or ["none"])
    engines = [_row(f"{engine.backend} on {engine.device}", engine.reason or "yes") for engine in found.engines]
    return lines + _section("runs here", engines)


def _tensorrt(built: "TensorRT") -> list[str]:
    from mlmkit.artifact import FLAVOURS

    lines = [_row("version", f"{FLAVOURS[built.flavour]} {built.version}")]
    lines.append(_row("compute capability", ", ".join(built.targets)))
    for profile in built.profiles:
        sizes = (f"{axis} {' / '.join(map(str, getattr(profile, axis)))}" for axis in ("batch", "seq", "masked"))
        lines.append(_row(f"profile {profile.name}", ", ".join(sizes)))
        types = ", ".join(f"{count} {kind}" for kind, count in built.layers.get(profile.name, {}).items())
        scratch = built.scratch_mib.get(profile.name)
        lines.append(_row("  layers", types or "unknown"))
        lines.append(_row("  fused attention", str(built.fused_attention.get(profile.name, "none"))))
        lines.append(_row("  scratch memory", "unknown" if scratch is None else f"{scratch:,.0f} MiB"))
    if built.parity is None:
        return [*lines, "unproven: no GPU has run it"]
    return [*lines, _row("proven on", str(built.gpu)), *_report(built.parity)]


def _report(values: dict[str, Any]) -> list[str]:
    from mlmkit.artifact import report_rows

    return [_row(name, shown) for name, shown in report_rows(values)]


def _row(name: str, value: str) -> str:
    return f"{name:34} {value}"


def _section(title: str, lines: list[str]) -> list[str]:
    return [title, *(f"  {line}" for line in lines)]
