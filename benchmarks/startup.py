"""Start-up: time and peak memory of commands in fresh processes, with the files in the disk cache.

`mlmkit fill` of a BERT-base artifact with random weights in float32 (about 440 MB beside the graph), against
`transformers.pipeline` on the same weights. Aims: `import mlmkit` in less than 0.1 s beyond Python itself,
`mlmkit --help` in less than 0.3 s, `mlmkit fill` in less than 1.5 s. Then `mlmkit score` and `mlmkit eval` of a tiny
checkpoint and of its artifact on a few texts: what they take before they compute. Then the steps of filling a mask and
of scoring.
"""

import argparse
import time
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median

from harness import Report, alternate, main, table, timed
from inputs import TINY, artifact, checkpoint, held_out, kept_folder, write_lines
from processes import isolated, memory_mib, run_command

TEXT = "The [MASK] of the statement is an expression that is evaluated first."
PEER = "import sys, transformers; print(transformers.pipeline('fill-mask', model=sys.argv[1])(sys.argv[2]))"
HEADLINES = {
    "import_seconds": "import mlmkit",
    "help_seconds": "mlmkit --help",
    "fill_seconds": "mlmkit fill",
    "pipeline_seconds": "transformers.pipeline",
    "score_tiny_seconds": "mlmkit score, tiny checkpoint",
    "eval_tiny_seconds": "mlmkit eval, tiny checkpoint",
}
AIMS = {"import mlmkit": 0.1, "mlmkit --help": 0.3, "mlmkit fill": 1.5}


def measure(options: argparse.Namespace) -> Report:
    source = checkpoint("bert-base", num_hidden_layers=options.layers)
    target = artifact("bert-base", num_hidden_layers=options.layers)
    commands = {
        "python": ("-c", "pass"),
        "import mlmkit": ("-c", "import mlmkit"),
        "mlmkit --help": ("-m", "mlmkit", "--help"),
        "mlmkit fill": ("-m", "mlmkit", "fill", target, TEXT),
        "transformers.pipeline": ("-c", PEER, source, TEXT),
    }
    turns = {name: partial(timed, run_command, *arguments) for name, arguments in commands.items()}
    taken = alternate(turns, options.rounds)
    taken |= alternate(
        {name: partial(timed, run_command, *each) for name, each in small().items()}, options.small_rounds
    )
    taken["import mlmkit"] = [a - b for a, b in zip(taken["import mlmkit"], taken["python"], strict=True)]
    runs = {work: [isolated(steps, work, target) for _ in range(options.rounds)] for work in ("fill", "score")}
    processes = [{"": name, "seconds": times, "aim": AIMS.get(name)} for name, times in taken.items()]
    steps_of_all = [
        {"": work, "step": name, "seconds, or MB": median(run[name] for run in of_work)}
        for work, of_work in runs.items()
        for name in of_work[0]
    ]
    tables = [table("Whole processes (the import beyond Python's own time)", processes), table("Steps", steps_of_all)]
    headlines = {key: median(taken[name]) for key, name in HEADLINES.items()}
    return Report(tables, headlines=headlines, figures={"processes": taken, "steps": runs})


def small() -> dict[str, tuple[object, ...]]:
    """The commands whose time is their fixed cost: a tiny model on the beginnings of 16 texts."""
    texts = write_lines(kept_folder() / "startup.txt", [text[:200] for text in held_out()[:16]])
    models = {"tiny checkpoint": checkpoint("bert-base", **TINY), "tiny artifact": artifact("bert-base", **TINY)}
    works = {"score": (texts,), "eval": ("--set", texts, "--metric", "masked")}
    return {
        f"mlmkit {work}, {name}": ("-m", "mlmkit", work, model, *arguments)
        for name, model in models.items()
        for work, arguments in works.items()
    }


def steps(work: str, folder: Path) -> dict[str, float]:
    """The seconds of each step, then the memory, in a process of its own."""
    marks = {"": time.perf_counter()}
    from mlmkit.backends import load
    from mlmkit.fill import fill

    marks["import mlmkit.fill, numpy"] = time.perf_counter()
    import onnxruntime  # noqa: F401

    marks["import onnxruntime"] = time.perf_counter()
    from mlmkit.artifact import read_manifest

    read_manifest(folder)
    marks["hashing the files, once"] = time.perf_counter()
    model = load(str(folder), device="cpu")
    marks["load, which hashes too"] = time.perf_counter()
    targets = ["the", "name"] if work == "score" else []
    for name in (f"first {work}", f"second {work}"):
        fill(model, TEXT, targets=targets)
        marks[name] = time.perf_counter()
    figures = {name: after - before for (_, before), (name, after) in pairwise(marks.items())}
    weights = sum(path.stat().st_size for path in folder.iterdir()) / 1e6
    return figures | {"peak without the artifact, MB": memory_mib() * 1.048576 - weights}


if __name__ == "__main__":
    main(__doc__, measure, rounds=(5, 1), small_rounds=(3, 1), layers=(0, 2))
