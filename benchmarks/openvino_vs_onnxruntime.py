"""The scoring graph on a CPU: OpenVINO against ONNX Runtime, the same files.

BERT-base's and ModernBERT-base's shape with random weights in float32, on real text with 15 % of its positions masked.
OpenVINO computes in float32 too and uses as many threads. They take turns, each in a process of its own. Fails if their
log-probabilities differ by more than `BOUND`.

mlmkit does not use OpenVINO (docs/decisions.md): `make build/openvino/installed` installs it into a folder of its own.
"""

import argparse
import sys
from pathlib import Path
from statistics import median

import numpy as np
from export_vs_optimum import Engine, Turn, run_mlmkit, take_turn
from harness import Report, alternate, installed, main, ratios, table
from inputs import SHAPES, artifact, real_batch
from processes import calls, contestants

from mlmkit.artifact import GRAPH
from mlmkit.backends import Batch

BOUND = 1e-3  # nats
TURN_TOKENS = 4096  # per turn, in 40 batches at most
MODELS = ("bert-base", "modernbert-base")
OURS, PEER = "ONNX Runtime", "OpenVINO"


def run_openvino(packages: Path, folder: Path, threads: int) -> Engine:
    sys.path.insert(0, str(packages))
    import openvino  # pyright: ignore[reportMissingImports]

    settings = {"INFERENCE_NUM_THREADS": threads, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
    request = openvino.Core().compile_model(folder / GRAPH, "CPU", settings).create_infer_request()

    def forward(batch: Batch) -> object:
        return request.infer(batch._asdict())["log_prob"]

    return Engine(forward, lambda log_prob, _: np.array(log_prob))


def measure(options: argparse.Namespace) -> Report:
    packages = installed("openvino")
    rows, worst = [], 0.0
    for model in MODELS:
        folder = artifact(model, num_hidden_layers=options.layers)
        makers = {OURS: (run_mlmkit, folder), PEER: (run_openvino, packages, folder, options.threads)}
        with contestants(makers) as started:
            for size, length in SHAPES:
                for batch in (real_batch(size, length), real_batch(size, length, ragged=True)):
                    ours, peer = (each.call(take_turn, batch, 1).log_prob for each in started.values())
                    worst = max(worst, float(np.abs(ours.astype(np.float64) - peer).max()))
            assert worst <= BOUND, f"log-probabilities differ by {worst:.1e} nats"
            for size, length in SHAPES:
                repeats = min(max(1, TURN_TOKENS // (size * length)), 40)
                turns: dict[str, list[Turn]] = alternate(
                    calls(started, take_turn, real_batch(size, length), repeats), options.rounds
                )
                seconds = {name: [turn.seconds for turn in taken] for name, taken in turns.items()}
                rows.append(
                    {
                        "model": model,
                        "shape": f"{size} x {length}",
                        **{f"{name}, tokens/s": size * length / median(taken) for name, taken in seconds.items()},
                        "OpenVINO is x times as fast": ratios(seconds[PEER], seconds[OURS]),
                    }
                )
            memory = {name: contestant.peak_gib() for name, contestant in started.items()}
            rows.append({"model": model, "shape": "peak RSS, GiB", **{f"{n}, tokens/s": g for n, g in memory.items()}})
    return Report([table("", rows)], [f"Log-probabilities differ by at most {worst:.1e} nats."])


if __name__ == "__main__":
    main(__doc__, measure, layers=(0, 2), rounds=(5, 1))
