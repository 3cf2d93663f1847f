"""What each precision costs: its parity report on real text, the size of its graph, and its speed on this CPU.

A row a precision, exported with the drift allowed. The bounds in `export/parity.py` come
from trained checkpoints (`--checkpoints FOLDER ... --text FILE`); by default the weights are random, whose drift says
little, while sizes and speeds hold. fp16 is run as it is by ONNX Runtime's CPU provider; bf16 in float32 that is
rounded to it. Speeds are of alternating rounds over the same batch of 8 x 128 with 15 % masked.
"""

import argparse
import tempfile
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from harness import Report, Table, alternate, main, ratios, timed
from inputs import checkpoint, held_out, real_batch

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {},
    "fp16": {},
    "bf16": {},
    "int8": {"precision": "int8"},
    "int8-dynamic": {},
}
TIMED = ("fp32", "int8", "int8-dynamic")


def compare(source: str, texts: list[str], options: argparse.Namespace, folder: Path) -> tuple[list[Any], Any]:
    """The rows of one checkpoint, and all figures."""
    from mlmkit.backends import load
    from mlmkit.export.export import export
    from mlmkit.export.proof_text import ProofText

    reports, sizes = {}, {}
    for name, settings in PRECISIONS.items():
        settings = {"precision": name, **settings}
        reports[name] = export(
            source, folder / name, text=ProofText("the text", texts), allow_drift=True, **settings
        ).parity
        sizes[name] = sum(path.stat().st_size for path in (folder / name).glob("model.onnx*")) / 1e6
    engines = {name: load(str(folder / name), device="cpu") for name in TIMED}
    batch = real_batch(8, min(engines["fp32"].info.max_length, 128))
    calls = {name: partial(timed, engine.score, batch) for name, engine in engines.items()}
    taken = alternate(calls, options.rounds)
    rows = []
    for name, report in reports.items():
        speed = f"{median(ratios(taken[name], taken['fp32'])):.2f}" if name in TIMED else ""
        drift = f"{report['mean_log_prob_difference']:.1e}", f"{report['max_log_prob_difference']:.1e}"
        loss = f"{report['cross_entropy']:.3f} {report['cross_entropy_difference']:+.1e}"
        agreement = f"{report['top_1_agreement']:.2%}", f"{report['top_5_agreement']:.2%}"
        rows.append([Path(source).name, name, *drift, loss, *agreement, f"{sizes[name]:.1f}", speed])
    return rows, {"parity": reports, "megabytes": sizes, "seconds": taken}


def measure(options: argparse.Namespace) -> Report:
    """All checkpoints."""
    from mlmkit.documents import Source, read_documents

    sources = [name for name in options.checkpoints if name]
    sources = sources or [str(checkpoint("bert-small", num_hidden_layers=options.layers))]
    lines = read_documents(Source(options.text)) if options.text else held_out()
    texts = [line[:2000] for line in islice(lines, options.documents)]
    rows, figures = [], {}
    for source in sources:
        with tempfile.TemporaryDirectory() as folder:
            found, figures[Path(source).name] = compare(source, texts, options, Path(folder))
        rows += found
    header = ["checkpoint", "precision", "mean Δ log P", "max", "cross-entropy", "top 1", "top 5", "MB"]
    return Report([Table("", [*header, "x fp32's speed"], rows)], figures=figures)


if __name__ == "__main__":
    main(
        __doc__,
        measure,
        rounds=(5, 1),
        documents=(48, 8),
        layers=(0, 1),
        checkpoints=(("",), ("",)),
        text=("", ""),
    )
