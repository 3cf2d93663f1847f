"""An artifact's TensorRT plan on the GPU: TensorRT 10.13 and later, 11 too, or TensorRT for RTX.

A plan is machine code. It is loaded only if its bytes have the hash that the manifest says and TensorRT and the GPU are
those that it was built by and for.
"""

import hashlib
import logging
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.artifact import FLAVOURS, PLAN, Manifest, TensorRT
from mlmkit.backends import Batch, Scored, open_artifact
from mlmkit.backends.contexts import Lane
from mlmkit.backends.cuda import find_gpu
from mlmkit.backends.fitting import choose, shape_of, split, widest
from mlmkit.backends.trt import FLAVOUR, LOGGER, NAME, RTX, create_runtime, trt
from mlmkit.errors import CheckError, UserError

log = logging.getLogger(__name__)

INPUTS = Batch._fields
OUTPUTS = {"log_prob": np.float32, "rank": np.int64, "top_log_prob": np.float32, "top_id": np.int64}
AGAIN = "build the plan again on this machine (mlmkit export --trt)"


def obstacle(built: TensorRT) -> str | None:
    """Why this machine cannot run a plan that was built so, or None if it can."""
    try:
        gpu = find_gpu()
    except UserError as error:
        return str(error)
    if built.flavour != FLAVOUR:
        return f"the plan is of {FLAVOURS[built.flavour]} and {NAME} is what is installed here: {AGAIN}"
    if (here := trt.__version__) != built.version:
        return f"the plan is of {NAME} {built.version} and this is {here}: {AGAIN}"
    if not any(_reaches(target, gpu.compute_capability) for target in built.targets):
        targets, here = ", ".join(built.targets), gpu.compute_capability
        return f"the plan is for compute capability {targets} and this GPU has {here}: {AGAIN}"
    return None


def _reaches(target: str, capability: str) -> bool:
    least, here = (tuple(map(int, text.rstrip("+").split("."))) for text in (target, capability))
    return here == least or (target.endswith("+") and here > least)


class TensorRTBackend:
    """The artifact's plan, loaded when it is first needed.

    Batches that no profile holds are split here. One thread runs at once on each profile.
    Raises `UserError` when the artifact has no plan that may run here.
    """

    name = "tensorrt"
    device = "cuda"

    def __init__(self, path: str) -> None:
        self.manifest, _, self.tokenizer, info = open_artifact(path)
        built = self.manifest.tensorrt
        if built is None or not built.profiles or PLAN not in self.manifest.files:
            raise UserError(f"{path} has no TensorRT plan: {AGAIN}")
        if reason := obstacle(built):
            raise UserError(f"{path}: {reason}")
        self.gpu = find_gpu().name
        if built.gpu not in (None, self.gpu):
            log.warning("the plan was proven on %s and this is %s", built.gpu, self.gpu)
        self.info = replace(info, max_length=min(info.max_length, max(p.seq[2] for p in built.profiles)))
        if any(sizes[0] > 1 for profile in built.profiles for sizes in (profile.batch, profile.seq, profile.masked)):
            raise UserError(f"{path}: its plan takes no batch of one token: {AGAIN}")
        self.profiles = built.profiles
        self._runtime = create_runtime()  # must outlive its engine
        self._loaded: _Engine | None = None
        self._lock = threading.Lock()

    def score(self, batch: Batch) -> Scored:
        self._refuse(batch)
        masked = len(batch.positions)
        results: dict[str, NDArray[Any]] = {
            name: np.empty((masked, self.info.top_k) if name.startswith("top_") else masked, kind)
            for name, kind in OUTPUTS.items()
        }
        if masked:
            engine = self._engine()
            for index, part in split(batch, widest(self.profiles, batch.input_ids.shape[1])):
                for name, values in self._run_part(engine, part).items():
                    results[name][index] = values
        return Scored(**results)

    def _run_part(self, engine: "_Engine", part: Batch) -> dict[str, NDArray[Any]]:
        lane = engine.lane(choose(self.profiles, shape_of(part)))
        try:
            with lane.lock:
                return lane.run(part)
        except CheckError as error:
            raise CheckError(
                f"{self.info.path}: TensorRT failed on a batch of shape {part.input_ids.shape} with "
                f"{len(part.positions)} positions: {error} ({LOGGER.reason()})"
            ) from error

    def _refuse(self, batch: Batch) -> None:
        """TensorRT reads whatever lies at an index that is out of range, so none must come so far."""
        rows, seq = batch.input_ids.shape
        vocabulary = self.info.vocabulary_size
        for name, limit in {"input_ids": vocabulary, "positions": rows * seq, "targets": vocabulary}.items():
            values = getattr(batch, name)
            if values.size and not 0 <= values.min() <= values.max() < limit:
                raise CheckError(f"{self.info.path}: {name} has a value outside 0 to {limit - 1}")
        if seq > self.info.max_length:
            raise CheckError(f"{self.info.path} takes {self.info.max_length} tokens and this batch has rows of {seq}")

    def _engine(self) -> "_Engine":
        with self._lock:
            if self._loaded is None:
                engine = load_engine(self._runtime, Path(self.info.path), self.manifest)
                self._loaded = _Engine(engine, self)
            return self._loaded


def load_engine(runtime: trt.Runtime, folder: Path, manifest: Manifest) -> trt.ICudaEngine:
    """The plan. Raises `UserError` for a changed plan or one that does not load."""
    # Hashed here too and not only when the manifest was read: these very bytes are what runs.
    content = (folder / PLAN).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.files[PLAN]:
        raise UserError(f"{folder}: {PLAN} is not the file that was built (its SHA-256 differs): {AGAIN}")
    if RTX:
        from mlmkit.backends.rtx import invalidity

        if reason := invalidity(runtime, content):
            raise UserError(f"{folder}: {NAME} cannot run {PLAN} here ({reason}): {AGAIN}")
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise UserError(f"{folder}: {NAME} cannot load {PLAN}: {LOGGER.reason()}: {AGAIN}")
    return engine


class _Engine:
    """A loaded plan, with a lane for each profile."""

    def __init__(self, engine: trt.ICudaEngine, backend: TensorRTBackend) -> None:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        if sorted(names) != sorted([*INPUTS, *OUTPUTS]) or engine.num_optimization_profiles != len(backend.profiles):
            raise UserError(f"the plan has tensors {', '.join(names)} and is not the one that was built: {AGAIN}")
        if any(engine.get_tensor_location(name) != trt.TensorLocation.DEVICE for name in names):
            raise UserError(f"the plan wants a tensor in host memory, which mlmkit's graphs never do: {AGAIN}")
        k = backend.info.top_k
        if engine.get_tensor_shape("top_id")[1] != k:
            raise UserError(f"the plan gives {engine.get_tensor_shape('top_id')[1]} candidates, not {k}: {AGAIN}")
        self._engine, self._gpu, self._lanes, self._lock = engine, backend.gpu, dict[int, Lane](), threading.Lock()
        self._dtypes = {name: np.dtype(trt.nptype(engine.get_tensor_dtype(name))) for name in names}

    def lane(self, profile: int) -> Lane:
        """The profile's, made when it is first needed."""
        with self._lock:
            if profile not in self._lanes:
                self._lanes[profile] = Lane(self._create_context(), profile, self._dtypes, list(OUTPUTS))
            return self._lanes[profile]

    def _create_context(self) -> trt.IExecutionContext:
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # memory for one profile, not the largest
        if RTX:
            from mlmkit.backends.rtx import create_context

            return create_context(self._engine, strategy, self._gpu)
        return self._engine.create_execution_context(strategy)
