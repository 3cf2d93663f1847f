"""TensorRT itself, on a machine that has it and a GPU: pytest -m tensorrt -s

Builds plans in float32, float16 and bfloat16 and compares them with torch and with the onnx backend. Not run yet: no
machine with TensorRT and a GPU was available.
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import KINDS, PROOF, paragraphs
from test_export import random_batch

import mlmkit
from mlmkit.artifact import TensorRT, read_manifest, write_manifest
from mlmkit.backends import load
from mlmkit.errors import UserError
from mlmkit.export.export import export
from mlmkit.export.parity import BOUNDS
from mlmkit.export.profiles import PlanOptions

pytestmark = pytest.mark.tensorrt

SHAPES = [(1, 1, 1), (1, 64, 5), (17, 13, 300), (3, 31, 1), (5, 7, 0)]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> Any:
    """Skips, with the reason, if no plan can run here."""
    try:
        from mlmkit.backends.tensorrt.bindings import NAME, trt
        from mlmkit.backends.tensorrt.cuda import find_gpu

        return f"{NAME} {trt.__version__}", find_gpu()
    except (ImportError, OSError) as error:
        pytest.skip(f"TensorRT cannot be imported: {error}")
    except UserError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def planned(gpu, tmp_path_factory, checkpoint) -> Callable[..., Path]:
    """An artifact with a plan, by kind and precision."""

    @cache
    def make(kind: str = "bert", precision: str = "fp32") -> Path:
        folder, plans = tmp_path_factory.mktemp("planned") / "artifact", PlanOptions(max_batch=8, max_masked=256)
        export(str(checkpoint(kind)), folder, precision=precision, text=PROOF, plans=plans)
        return folder

    return make


def built(folder: Path) -> TensorRT:
    description = read_manifest(folder).tensorrt
    assert description is not None
    return description


@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_parity_with_torch(planned, checkpoint, kind, precision):
    here, there = load(planned(kind, precision), "tensorrt"), load(checkpoint(kind))
    bound, largest = BOUNDS[precision].max_log_prob, 0.0
    for shape in SHAPES:
        batch = random_batch(*shape)
        scored, expected = here.score(batch), there.score(batch)
        assert scored.top_id.shape == (shape[2], here.info.top_k)
        for name in ("log_prob", "top_log_prob"):
            differences = np.abs(getattr(scored, name) - getattr(expected, name))
            largest = max(largest, float(differences.max(initial=0.0)))
        if precision == "fp32":
            assert (scored.top_id[:, 0] == expected.top_id[:, 0]).all()
    layers = built(planned(kind, precision)).layers
    print(f"\n{kind} {precision}: log P differs by at most {largest:.1e} nats; layers {layers}")  # noqa: T201
    assert largest <= bound
    assert precision == "fp32" or all(counts.get(precision, 0) > 0 for counts in layers.values())


def test_the_plan_is_picked_and_its_profiles_hold(planned):
    here = load(planned())
    assert (here.name, here.device) == ("tensorrt", "cuda")
    profiles = built(planned()).profiles
    assert [profile.name for profile in profiles] == ["latency", "throughput"]
    _, _, most_rows = profiles[-1].batch
    _, _, most_masked = profiles[-1].masked
    for rows, masked in [(1, 1), (most_rows, most_masked), (most_rows * 2 + 1, most_masked + 1)]:
        assert np.isfinite(here.score(random_batch(rows, profiles[-1].seq[2], masked)).log_prob).all()


def test_evaluation_equals_that_of_onnx(planned):
    here, there = (
        mlmkit.evaluate(planned(), paragraphs(), metrics=["masked", "pseudo"], backend=name)
        for name in ("tensorrt", "onnx")
    )
    assert here.result["backend"]["name"] == "tensorrt"
    assert here.tokens["input_id"] == there.tokens["input_id"], "the same masks"
    for name, metric in there.metrics.items():
        assert here.metrics[name]["value"] == pytest.approx(metric["value"], rel=1e-4, abs=1e-4), name


def test_threads_change_nothing(planned):
    here = load(planned(), "tensorrt")
    batches = [random_batch(rows, seq, 3) for rows in (1, 2, 4) for seq in (5, 9, 33, 64)] * 3
    expected = [here.score(batch).log_prob for batch in batches]
    with ThreadPoolExecutor(4) as pool:
        scored = list(pool.map(lambda batch: here.score(batch).log_prob, batches))
    np.testing.assert_allclose(np.concatenate(scored), np.concatenate(expected), atol=1e-4, rtol=0)


def test_a_plan_is_proven_by_the_command(planned, tmp_path):
    from mlmkit.export.plans import prove_plan

    folder = Path(shutil.copytree(planned(), tmp_path / "copy"))
    unproven = replace(built(folder), gpu=None, parity=None)
    write_manifest(folder, replace(read_manifest(folder), tensorrt=unproven))
    assert load(folder).name == "onnx"
    prove_plan(folder)
    assert load(folder).name == "tensorrt"
