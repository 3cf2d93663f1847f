"""Runs an artifact's TensorRT plan on the GPU.

A plan is machine code, so it is loaded only if its bytes have the SHA-256 in the manifest, and only with the version of
TensorRT and on a GPU that it was built for.
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
from mlmkit.backends.protocol import INPUTS, OUTPUTS, Batch, Scored, open_artifact
from mlmkit.backends.tensorrt.batch_splitting import first_profile, largest_profile, shape_of, split_batch
from mlmkit.backends.tensorrt.bindings import FLAVOUR, LOGGER, NAME, RTX, create_runtime, trt
from mlmkit.backends.tensorrt.cuda import find_gpu
from mlmkit.backends.tensorrt.execution_contexts import ExecutionContext
from mlmkit.errors import CheckError, UserError

log = logging.getLogger(__name__)

REBUILD_HINT = "build the plan again on this machine (mlmkit export --trt)"


def obstacle(built: TensorRT) -> str | None:
    """Why this machine cannot run a plan with these properties, or None if it can."""
    try:
        gpu = find_gpu()
    except UserError as error:
        return str(error)
    if built.flavour != FLAVOUR:
        return f"the plan is of {FLAVOURS[built.flavour]}, but {NAME} is installed here: {REBUILD_HINT}"
    if (here := trt.__version__) != built.version:
        return f"the plan is of {NAME} {built.version} and this is {here}: {REBUILD_HINT}"
    if not any(_includes(target, gpu.compute_capability) for target in built.targets):
        targets, here = ", ".join(built.targets), gpu.compute_capability
        return f"the plan is for compute capability {targets} and this GPU has {here}: {REBUILD_HINT}"
    return None


def _includes(target: str, capability: str) -> bool:
    least, here = (tuple(map(int, text.rstrip("+").split("."))) for text in (target, capability))
    return here == least or (target.endswith("+") and here > least)


class TensorRTBackend:
    """A loaded plan with one execution context per profile, created when the profile is first used.

    Batches that no profile holds are split. Raises `UserError` if the artifact has no plan, or none that runs here.
    """

    name = "tensorrt"
    device = "cuda"

    def __init__(self, path: str) -> None:
        self.manifest, _, self.tokenizer, info = open_artifact(path)
        if self.manifest.tensorrt is None:
            raise UserError(f"{path} has no TensorRT plan: {REBUILD_HINT}")
        if reason := obstacle(self.manifest.tensorrt):
            raise UserError(f"{path}: {reason}")
        self.gpu, proven_on = find_gpu().name, self.manifest.tensorrt.gpu
        if proven_on not in (None, self.gpu):
            log.warning("the plan was proven on %s and this is %s", proven_on, self.gpu)
        self.profiles = self.manifest.tensorrt.profiles
        self.info = replace(info, max_length=min(info.max_length, max(p.seq[2] for p in self.profiles)))
        if any(sizes[0] > 1 for profile in self.profiles for sizes in (profile.batch, profile.seq, profile.masked)):
            raise UserError(f"{path}: its plan does not take a batch of one token: {REBUILD_HINT}")
        self._runtime = create_runtime()  # must outlive its engine
        self._engine = load_engine(self._runtime, Path(path), self.manifest)
        names = [self._engine.get_tensor_name(index) for index in range(self._engine.num_io_tensors)]
        self._check_engine(names)
        self._dtypes = {name: np.dtype(trt.nptype(self._engine.get_tensor_dtype(name))) for name in names}
        self._contexts: dict[int, ExecutionContext] = {}
        self._lock = threading.Lock()

    def score(self, batch: Batch) -> Scored:
        self._check_batch(batch)
        masked = len(batch.positions)
        results: dict[str, NDArray[Any]] = {
            name: np.empty((masked, self.info.top_k)[:axes], kind) for name, (kind, axes) in OUTPUTS.items()
        }
        if masked:
            for indices, part in split_batch(batch, largest_profile(self.profiles, batch.input_ids.shape[1])):
                for name, values in self._run(part).items():
                    results[name][indices] = values
        return Scored(**results)

    def _run(self, part: Batch) -> dict[str, NDArray[Any]]:
        context = self._context(first_profile(self.profiles, shape_of(part)))
        try:
            with context.lock:
                return context.run(part)
        except CheckError as error:
            raise CheckError(
                f"{self.info.path}: TensorRT failed on a batch of shape {part.input_ids.shape} with "
                f"{len(part.positions)} positions: {error} ({LOGGER.reason()})"
            ) from error

    def _context(self, profile: int) -> ExecutionContext:
        with self._lock:
            if profile not in self._contexts:
                self._contexts[profile] = ExecutionContext(self._create_context(), profile, self._dtypes)
            return self._contexts[profile]

    def _create_context(self) -> trt.IExecutionContext:
        strategy = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE  # memory for one profile, not the largest
        if RTX:
            from mlmkit.backends.tensorrt.rtx import create_context

            return create_context(self._engine, strategy, self.gpu)
        return self._engine.create_execution_context(strategy)

    def _check_batch(self, batch: Batch) -> None:
        """Raise `CheckError` for indices out of range: TensorRT would read whatever memory lies there."""
        rows, seq = batch.input_ids.shape
        vocabulary = self.info.vocabulary_size
        for name, limit in {"input_ids": vocabulary, "positions": rows * seq, "targets": vocabulary}.items():
            values = getattr(batch, name)
            if values.size and not 0 <= values.min() <= values.max() < limit:
                raise CheckError(f"{self.info.path}: {name} has a value outside 0 to {limit - 1}")
        if seq > self.info.max_length:
            raise CheckError(f"{self.info.path} takes {self.info.max_length} tokens and this batch has rows of {seq}")

    def _check_engine(self, names: list[str]) -> None:
        """Raise `UserError` for a plan with other tensors or profiles than the manifest says."""
        expected = sorted([*INPUTS, *OUTPUTS])
        if sorted(names) != expected or self._engine.num_optimization_profiles != len(self.profiles):
            raise UserError(
                f"the plan has tensors {', '.join(names)} and is not the one that was built: {REBUILD_HINT}"
            )
        if any(self._engine.get_tensor_location(name) != trt.TensorLocation.DEVICE for name in names):
            raise UserError(f"the plan has a tensor in host memory, which mlmkit's graphs never have: {REBUILD_HINT}")
        if (k := self._engine.get_tensor_shape("top_id")[1]) != self.info.top_k:
            raise UserError(f"the plan gives {k} candidates, not {self.info.top_k}: {REBUILD_HINT}")


def load_engine(runtime: trt.Runtime, folder: Path, manifest: Manifest) -> trt.ICudaEngine:
    """Load the plan. Raises `UserError` if it has changed or cannot be loaded here."""
    content = (folder / PLAN).read_bytes()
    if hashlib.sha256(content).hexdigest() != manifest.files[PLAN]:  # hashed again: these very bytes are what runs
        raise UserError(f"{folder}: {PLAN} is not the file that was built (its SHA-256 differs): {REBUILD_HINT}")
    if RTX:
        from mlmkit.backends.tensorrt.rtx import invalidity

        if reason := invalidity(runtime, content):
            raise UserError(f"{folder}: {NAME} cannot run {PLAN} here ({reason}): {REBUILD_HINT}")
    engine: trt.ICudaEngine = runtime.deserialize_cuda_engine(content)
    if engine is None:
        raise UserError(f"{folder}: {NAME} cannot load {PLAN}: {LOGGER.reason()}: {REBUILD_HINT}")
    return engine
