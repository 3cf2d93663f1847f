"""What the installed ONNX Runtime package costs and brings: import, memory, and the top-k that scoring leaves out.

A BERT-small shape on full rows with 15 % masked. Run it in one environment with onnxruntime and in one with
onnxruntime-gpu to compare the packages.
"""

import argparse
from functools import partial
from statistics import median

from harness import Contestant, Report, Table, alternate, main, peak_mib, ratios, run_command, spread, timed
from inputs import artifact, real_batch

IMPORT = "import time; t = time.perf_counter(); import onnxruntime; print(time.perf_counter() - t)"
ROWS, LENGTH = 16, 128


def measure(options: argparse.Namespace) -> Report:
    """Scoring and prediction take turns."""
    import onnxruntime

    engine = Contestant(open_engine, str(artifact("bert-small", num_hidden_layers=options.layers)))
    taken = alternate({name: partial(engine.call, seconds, name) for name in ("score", "predict")}, options.rounds)
    peak = engine.call(peak_mib)
    engine.stop()
    # An earlier run of another package leaves its files in the page cache; the median of fresh imports is fair.
    imports = [float(run_command("-c", IMPORT)) for _ in range(options.rounds)]
    rates = {name: [ROWS / time for time in times] for name, times in taken.items()}
    rows = [
        ["import, seconds", spread(imports, 3)],
        ["peak resident memory, MiB", f"{peak:.0f}"],
        [f"rows of {LENGTH} a second, scored", spread(rates["score"], 1)],
        [f"rows of {LENGTH} a second, with the top candidates", spread(rates["predict"], 1)],
        ["without them, x as fast", spread(ratios(taken["score"], taken["predict"]))],
    ]
    return Report(
        [Table("", ["", f"onnxruntime {onnxruntime.__version__}"], rows)],
        headlines={"onnxruntime_import_seconds": median(imports)},
        figures={**taken, "import": imports},
    )


def open_engine(path: str) -> tuple:
    """In a process of its own."""
    from mlmkit.backends import load

    return load(path, device="cpu"), real_batch(ROWS, LENGTH)


def seconds(made: tuple, method: str) -> float:
    """Of a batch."""
    engine, batch = made
    return timed(getattr(engine, method), batch)


if __name__ == "__main__":
    main(__doc__, measure, rounds=(7, 1), layers=(0, 1))
