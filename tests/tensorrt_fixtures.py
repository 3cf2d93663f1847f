"""An artifact with plans that stand-ins built for it, and what its backend is compared with."""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stub

from mlmkit.artifact import hash_files, read_manifest, write_manifest
from mlmkit.backends import Batch

SHAPES = [(1, 1, 1), (1, 64, 5), (17, 13, 300), (3, 31, 1), (4, 8, 32), (2, 64, 64)]
SMALL = {"max_batch": 4, "max_seq": 64, "max_masked": 16}


@pytest.fixture
def machine(monkeypatch) -> Iterator[tensorrt_stub.Machine]:
    yield tensorrt_stub.install(monkeypatch)
    tensorrt_stub.forget()


@pytest.fixture
def folder(artifact, tmp_path) -> Path:
    return Path(shutil.copytree(artifact("bert"), tmp_path / "artifact"))


@pytest.fixture
def plan(machine, folder) -> Callable[..., Path]:
    """The artifact with plans built for it."""

    def build(**options: Any) -> Path:
        from mlmkit.export.tensorrt import PlanOptions, build_plan

        manifest = replace(read_manifest(folder), tensorrt=None)
        built = build_plan(folder, manifest, PlanOptions(**{**SMALL, **options}))
        write_manifest(folder, replace(manifest, files=hash_files(folder), tensorrt=built))
        return folder

    return build


def backend(folder: Path) -> Any:
    from mlmkit.backends.tensorrt import TensorRTBackend

    return TensorRTBackend(str(folder))


def random_batch(rows: int, seq: int, masked: int) -> Batch:
    """Ragged rows; positions in no order, some of them twice."""
    generator = np.random.default_rng(rows * 1000 + seq)
    attention_mask = (np.arange(seq) < generator.integers(1, seq + 1, (rows, 1))).astype(np.int64)
    positions = generator.choice(np.flatnonzero(attention_mask), masked)
    input_ids, targets = generator.integers(5, 600, (rows, seq)), generator.integers(5, 600, masked)
    return Batch(input_ids, attention_mask, positions, targets)


def assert_equal(found: Any, expected: Any) -> None:
    for name, values in expected._asdict().items():
        got = getattr(found, name)
        assert (got.dtype, got.shape) == (values.dtype, values.shape)
        np.testing.assert_allclose(got, values, atol=2e-5, rtol=0, err_msg=name)
