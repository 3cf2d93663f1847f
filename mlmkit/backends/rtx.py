"""What TensorRT for RTX alone has: targets of a build, a plan's validity, kernels kept between starts."""

import logging
from pathlib import Path

from mlmkit.backends.trt import trt
from mlmkit.files import atomic, cache_root

log = logging.getLogger(__name__)


def set_target(config: trt.IBuilderConfig, target: str) -> None:
    """Build for `sm75` or `sm121` alone. Without it, a plan is for all that `PORTABLE` lists."""
    config.num_compute_capabilities = 1
    capability = trt.ComputeCapability.SM75 if target == "sm75" else trt.ComputeCapability.SM121
    config.set_compute_capability(capability, 0)


def invalidity(runtime: trt.Runtime, plan: bytes) -> str:
    """Why this machine cannot run a plan, in TensorRT's words, or nothing. Needs a driver."""
    validity, diagnostics = runtime.get_engine_validity(plan)
    known = trt.EngineInvalidityDiagnostics.__members__.items()
    reasons = ", ".join(name for name, bit in known if diagnostics & int(bit)) or "no reason given"
    if validity == trt.EngineValidity.SUBOPTIMAL:
        log.warning("the plan runs here, but not at its best: %s", reasons)
    return reasons if validity == trt.EngineValidity.INVALID else ""


def create_context(
    engine: trt.ICudaEngine, strategy: trt.ExecutionContextAllocationStrategy, gpu: str
) -> trt.IExecutionContext:
    """An execution context, with the kernels that an earlier start compiled for this GPU, and keep them for the next.

    Kernels are compiled when a context is made, "typically under 15 s" by NVIDIA's documentation. TensorRT itself
    refuses kernels of another version, GPU or driver.
    """
    config: trt.IRuntimeConfig = engine.create_runtime_config()
    config.set_execution_context_allocation_strategy(strategy)
    cache: trt.IRuntimeCache = config.create_runtime_cache()
    name = "".join(letter if letter.isalnum() else "-" for letter in gpu)
    file = cache_root() / "tensorrt" / f"kernels-{trt.__version__}-{name}.cache"
    kept = file.read_bytes() if file.is_file() else b""
    if kept and not cache.deserialize(kept):
        log.info("the compiled kernels in %s are not for this GPU and driver: compiling them anew", file)
    config.set_runtime_cache(cache)
    context: trt.IExecutionContext = engine.create_execution_context(config)
    kernels = bytes(cache.serialize())
    if kernels != kept:
        _write(file, kernels)
    return context


def _write(file: Path, kernels: bytes) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as partial:
            partial.write_bytes(kernels)
    except OSError as error:
        log.warning("cannot keep the compiled kernels in %s: %s", file, error.strerror)
