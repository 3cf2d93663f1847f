"""TensorRT itself, on a machine that has it and a GPU: pytest -m tensorrt -s

Builds plans in float32, float16 and bfloat16 and compares them with torch and with the onnx backend. Not run yet: no
machine with TensorRT and a GPU was available.
"""

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KINDS, edit_record, paragraphs
from test_export import random_batch

import mlmkit
from mlmkit.artifact import GRAPH, hash_files, read_manifest, write_manifest
from mlmkit.backends import Backend, load
from mlmkit.errors import UserError
from mlmkit.export.parity import BOUNDS

pytestmark = pytest.mark.tensorrt

SHAPES = [(1, 1, 1), (1, 64, 5), (17, 13, 300), (3, 31, 1), (5, 7, 0)]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Any:
    """Skips, with the reason, where nothing can run."""
    try:
        from mlmkit.backends.tensorrt.bindings import NAME, trt
        from mlmkit.backends.tensorrt.cuda import find_gpu

        return f"{NAME} {trt.__version__}", find_gpu()
    except (ImportError, OSError) as error:
        pytest.skip(f"TensorRT cannot be imported: {error}")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def planned(gpu, tmp_path_factory, checkpoint, text_file) -> Callable[..., Path]:
    """An artifact with plans, by kind and precision."""
    folders: dict[str, Path] = {}

    def make(kind: str = "bert", precision: str = "fp32") -> Path:
        key = f"{kind}-{precision}"
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("planned") / "artifact"
            export(checkpoint(kind), folders[key], precision, text_file)
            add_plans(folders[key], max_batch=8, max_masked=256)
        return folders[key]

    return make


def export(checkpoint: Path, folder: Path, precision: str, text: Path) -> None:
    command = [sys.executable, "-m", "mlmkit", "export", str(checkpoint), "--output", str(folder), "--text", str(text)]
    command += ["--precision", precision] if precision != "fp32" else []
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def add_plans(folder: Path, **options: Any) -> None:
    from mlmkit.export.graphs import save_graph
    from mlmkit.export.plans import plan_model
    from mlmkit.export.profiles import PlanOptions
    from mlmkit.export.tensorrt import build_plan

    manifest = read_manifest(folder)
    with tempfile.TemporaryDirectory() as temporary:
        save_graph(plan_model(folder / GRAPH, manifest.precision), graph := Path(temporary) / GRAPH)
        built = build_plan(
            graph,
            folder,
            architecture=manifest.architecture,
            precision=manifest.precision,
            max_length=manifest.max_length,
            options=PlanOptions(**options),
        )
    # As if it had been proven, as each test does that for itself.
    built = replace(built, gpu="here", parity=manifest.parity)
    write_manifest(folder, replace(manifest, files=hash_files(folder), tensorrt=built))


def backend(folder: Path) -> Any:
    from mlmkit.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(str(folder))


def assert_close(here: Backend, there: Backend, bound: float) -> float:
    """The largest difference of a log-probability over all shapes."""
    largest = 0.0
    for shape in SHAPES:
        batch = random_batch(*shape)
        found, expected = here.score(batch), there.score(batch)
        assert found.top_id.shape == (shape[2], here.info.top_k)
        largest = max(largest, float(np.abs(found.log_prob - expected.log_prob).max(initial=0.0)))
        top = np.abs(found.top_log_prob - expected.top_log_prob).max(initial=0.0)
        largest = max(largest, float(top))
        if bound <= 1e-4:
            assert (found.top_id[:, 0] == expected.top_id[:, 0]).all()
    assert largest <= bound
    return largest


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_torch(planned, checkpoint, kind, precision):
    folder = planned(kind, precision)
    largest = assert_close(backend(folder), load(str(checkpoint(kind))), BOUNDS[precision].max_log_prob)
    built = read_manifest(folder).tensorrt
    assert built is not None
    print(f"\n{kind} {precision}: log P differs by at most {largest:.1e} nats; layers {built.layers}")  # noqa: T201
    if precision != "fp32":
        assert all(counts.get(precision, 0) > 0 for counts in built.layers.values()), (
            "no layer computes in the type that was asked for"
        )


def test_the_plan_is_picked_and_its_profiles_hold(planned):
    folder = planned()
    here = load(str(folder))
    assert (here.name, here.device) == ("tensorrt", "cuda")
    built = read_manifest(folder).tensorrt
    assert built is not None and [profile.name for profile in built.profiles] == ["latency", "throughput"]
    largest = built.profiles[-1]
    for rows, masked in [
        (1, 1),
        (largest.batch[2], largest.masked[2]),
        (largest.batch[2] * 2 + 1, largest.masked[2] + 1),
    ]:
        batch = random_batch(rows, largest.seq[2], masked)
        assert np.isfinite(here.score(batch).log_prob).all()


def test_evaluation_equals_that_of_onnx(planned, tmp_path):
    folder = planned()
    found, expected = (
        mlmkit.evaluate(folder, paragraphs(), metrics=["masked", "pseudo"], backend=name)
        for name in ("tensorrt", "onnx")
    )
    assert found.result["backend"]["name"] == "tensorrt"
    assert found.tokens["input_id"] == expected.tokens["input_id"], "the same masks"
    for name, metric in expected.metrics.items():
        assert found.metrics[name]["value"] == pytest.approx(metric["value"], rel=1e-4, abs=1e-4), name


def test_threads_change_nothing(planned):
    folder = planned()
    here = backend(folder)
    batches = [random_batch(rows, seq, 3) for rows in (1, 2, 4) for seq in (5, 9, 33, 64)] * 3
    expected = [here.score(batch).log_prob for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda batch: here.score(batch).log_prob, batches))
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4, rtol=0)


def test_a_plan_of_another_version_or_gpu_is_refused(planned, tmp_path):
    folder = Path(shutil.copytree(planned(), tmp_path / "copy"))
    manifest = json.loads((folder / "mlmkit.json").read_text())
    for name, value in (("version", "10.0.0.1"), ("targets", ["5.0"])):
        edit_record(folder / "mlmkit.json", tensorrt={**manifest["tensorrt"], name: value})
        with pytest.raises(UserError, match="build the plan again"):
            load(str(folder), backend="tensorrt")


def test_a_graph_that_is_none_is_refused_with_a_reason(planned, tmp_path):
    folder = Path(shutil.copytree(planned(), tmp_path / "copy"))
    (folder / "model.onnx").write_bytes(b"no graph")
    from mlmkit.export.profiles import PlanOptions
    from mlmkit.export.tensorrt import build_plan

    with pytest.raises(UserError, match="cannot parse it"):
        build_plan(folder / GRAPH, folder, architecture="bert", precision="fp32", max_length=64, options=PlanOptions())


def test_a_plan_is_proven_by_the_command(planned, tmp_path):
    from mlmkit.export.plans import prove_plan

    folder = Path(shutil.copytree(planned(), tmp_path / "copy"))
    built = read_manifest(folder).tensorrt
    assert built is not None
    write_manifest(folder, replace(read_manifest(folder), tensorrt=replace(built, gpu=None, parity=None)))
    assert load(str(folder)).name == "onnx"
    prove_plan(folder)
    assert load(str(folder)).name == "tensorrt"
