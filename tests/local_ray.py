"""Ray with two workers on this machine, for the tests of serving and of clusters."""

import importlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest


@contextmanager
def local_ray() -> Iterator[Any]:
    """The `ray` module while Ray runs; skips the test where it does not start."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    ray = importlib.import_module("ray")
    temporary = tempfile.mkdtemp(prefix="ray-")  # not pytest's: Ray's sockets need a short path
    try:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _temp_dir=temporary,
        )
    except Exception as error:  # too little shared memory or time, say
        pytest.skip(f"Ray does not start on this machine: {error}")
    try:
        yield ray
    finally:
        ray.shutdown()
        shutil.rmtree(temporary, ignore_errors=True)
