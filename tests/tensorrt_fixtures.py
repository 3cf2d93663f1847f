"""An artifact with a plan that the stand-ins of tensorrt_stub.py run, and helpers to compare its scores."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorrt_stub

from mlmkit.artifact import GRAPH, PLAN, Profile, TensorRT, hash_files, read_manifest, write_manifest
from mlmkit.backends import Batch, Scored
from mlmkit.export.profiles import PORTABLE, PlanOptions, make_profiles

SHAPES = [(1, 1, 1), (1, 64, 5), (17, 13, 300), (3, 31, 1), (4, 8, 32), (2, 64, 64)]
SMALL = {"max_batch": 4, "max_seq": 64, "max_masked": 16}


@pytest.fixture
def machine(monkeypatch) -> Iterator[tensorrt_stub.Machine]:
    """A machine with a GPU and TensorRT."""
    yield tensorrt_stub.install(monkeypatch)
    tensorrt_stub.forget()


@pytest.fixture
def rtx(monkeypatch) -> Iterator[tensorrt_stub.Machine]:
    """A machine with a GPU and TensorRT for RTX."""
    machine = tensorrt_stub.install(monkeypatch, "tensorrt_rtx")
    machine.capability = (8, 9)
    yield machine
    tensorrt_stub.forget()


@pytest.fixture
def folder(artifact, tmp_path) -> Path:
    return Path(shutil.copytree(artifact("bert"), tmp_path / "artifact"))


@pytest.fixture
def plan(machine, folder) -> Callable[..., Path]:
    """Adds a plan to the artifact, as `add_plan` does."""
    return lambda **values: add_plan(folder, **values)


@pytest.fixture
def rtx_plan(rtx, folder) -> Callable[..., Path]:
    """The same for TensorRT for RTX."""
    return lambda **values: add_plan(folder, "tensorrt_rtx", **values)


def add_plan(folder: Path, flavour: str = "tensorrt", proven: bool = True, **sizes: Any) -> Path:
    """Write a plan for the stand-ins (a header and the graph) and describe it in the manifest."""
    manifest, content = read_manifest(folder), (folder / GRAPH).read_bytes()
    profiles = make_profiles(PlanOptions(**{**SMALL, **sizes}), manifest.max_length)
    shapes = [{name: shapes_of(name, profile) for name in Batch._fields} for profile in profiles]
    header = {"outputs": Scored._fields, "profiles": shapes}
    (folder / PLAN).write_bytes(json.dumps(header).encode() + b"\n" + content)
    built = TensorRT(
        flavour=flavour,
        version=tensorrt_stub.Machine.version,
        targets=["9.0"] if flavour == "tensorrt" else PORTABLE,
        profiles=profiles,
        layers={profile.name: {"fp32": 3} for profile in profiles},
        fused_attention={},
        scratch_mib={profile.name: 1.5 for profile in profiles},
        gpu=tensorrt_stub.Machine.gpu if proven else None,
        parity=manifest.parity if proven else None,
    )
    write_manifest(folder, replace(manifest, files=hash_files(folder), tensorrt=built))
    return folder


def shapes_of(name: str, profile: Profile) -> list[Any]:
    rows = name in ("input_ids", "attention_mask")
    return list(zip(profile.batch, profile.seq, strict=True)) if rows else [(size,) for size in profile.masked]


def backend(folder: Path) -> Any:
    from mlmkit.backends.tensorrt.backend import TensorRTBackend

    return TensorRTBackend(str(folder))


def assert_equal(scored: Any, expected: Any) -> None:
    for name, values in expected._asdict().items():
        got = getattr(scored, name)
        assert (got.dtype, got.shape) == (values.dtype, values.shape)
        np.testing.assert_allclose(got, values, atol=2e-5, rtol=0, err_msg=name)
