"""What only TensorRT for RTX has: build targets, a plan's validity, and compiled kernels kept between starts."""

import logging
from pathlib import Path

from mlmkit.backends.tensorrt.bindings import trt
from mlmkit.files import atomic, cache_root

log = logging.getLogger(__name__)


def set_target(config: trt.IBuilderConfig, target: str) -> None:
    """Build for `sm75` or `sm121` only. By default a plan is for every GPU in `export.profiles.PORTABLE`."""
    config.num_compute_capabilities = 1
    capability = trt.ComputeCapability.SM75 if target == "sm75" else trt.ComputeCapability.SM121
    config.set_compute_capability(capability, 0)


def invalidity(runtime: trt.Runtime, plan: bytes) -> str:
    """Why this machine cannot run a plan, in TensorRT's words, or an empty string. Needs a driver."""
    validity, diagnostics = runtime.get_engine_validity(plan)
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = ", ".join(name for name, bit in known if diagnostics & int(bit)) or "no reason given"
    if validity == trt.EngineValidity.SUBOPTIMAL:
        log.warning("the plan runs on this GPU, but not at its best: %s", reasons)
    return reasons if validity == trt.EngineValidity.INVALID else ""


def create_context(
    engine: trt.ICudaEngine, strategy: trt.ExecutionContextAllocationStrategy, gpu: str
) -> trt.IExecutionContext:
    """Create an execution context, reusing the kernels that an earlier start compiled for this GPU.

    TensorRT compiles kernels when a context is created, "typically under 15 s" according to NVIDIA's documentation. It
    rejects cached kernels of another version, GPU or driver itself.
    """
    config: trt.IRuntimeConfig = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    cache: trt.IRuntimeCache = config.create_runtime_cache()
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    file = cache_root() / "tensorrt" / f"kernels-{trt.__version__}-{name}.cache"
    cached = file.read_bytes() if file.is_file() else b""
    if cached and not cache.deserialize(cached):
        log.info("the compiled kernels in %s are for another GPU or driver: compiling them again", file)
    config.set_runtime_cache(cache)
    context: trt.IExecutionContext = engine.create_execution_context(config)
    kernels = bytes(cache.serialize())
    if kernels != cached:
        _write(file, kernels)
    return context


def _write(file: Path, kernels: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial:
            partial.write_bytes(kernels)
    except OSError as error:
        log.warning("cannot save the compiled kernels to %s: %s", file, error.strerror)
