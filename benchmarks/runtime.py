"""What the installed ONNX Runtime package costs and brings: import, memory, and speed.

A BERT-small shape on full rows with 15 % masked. Run it in one environment with onnxruntime and in one with
onnxruntime-gpu to compare the packages.
"""

import argparse
from functools import partial
from statistics import median

from harness import Contestant, Report, Table, alternate, main, peak_mib, run_command, spread, timed
from inputs import artifact, real_batch

IMPORT = "import time; t = time.perf_counter(); import onnxruntime; print(time.perf_counter() - t)"
ROWS, LENGTH = 16, 128


def measure(options: argparse.Namespace) -> Report:
    """Time the engine on one batch."""
    import onnxruntime

    engine = Contestant(open_engine, str(artifact("bert-small", num_hidden_layers=options.layers)))
    taken = alternate({"score": partial(engine.call, seconds)}, options.rounds)
    peak = engine.call(peak_mib)
    engine.stop()
    # An earlier run of another package leaves its files in the page cache; the median of fresh imports is fair.
    imports = [float(run_command("-c", IMPORT)) for _ in range(options.rounds)]
    rows = [
        ["import, seconds", spread(imports, 3)],
        ["peak resident memory, MiB", f"{peak:.0f}"],
        [f"rows of {LENGTH} per second", spread([ROWS / time for time in taken["score"]], 1)],
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


def seconds(made: tuple) -> float:
    """Of a batch."""
    engine, batch = made
    return timed(engine.score, batch)


if __name__ == "__main__":
    main(__doc__, measure, rounds=(7, 1), layers=(0, 1))
