"""TensorRT's bindings: `tensorrt` (data-centre GPUs) if it is installed, otherwise `tensorrt_rtx` (RTX cards).

Imports neither cuda-python nor a driver, because TensorRT for RTX builds plans without a GPU.
"""

import logging
from collections import deque
from importlib.util import find_spec

if find_spec("tensorrt"):
    import tensorrt as trt  # pyright: ignore[reportMissingModuleSource]
else:
    import tensorrt_rtx as trt  # pyright: ignore[reportMissingImports]

from mlmkit.artifact import FLAVOURS
from mlmkit.errors import UserError

log = logging.getLogger(__name__)

RTX = hasattr(trt, "ComputeCapability")
FLAVOUR = "tensorrt_rtx" if RTX else "tensorrt"
NAME = FLAVOURS[FLAVOUR]
NO_DRIVER = "cudaError 35"  # without a driver, TensorRT for RTX reports it next to every other error
LAYERS_HEADING, SCRATCH_HEADING = "Layers:\n", "Total Activation Memory: "


class Logger(trt.ILogger):
    """Collects TensorRT's errors for the exception that follows and passes its warnings to Python's logging.

    TensorRT keeps the first logger that a process gives it, so there is only one: `LOGGER`. `layers` is the verbose
    description of the last plan that was built, `scratch` the scratch memory of each of its profiles in bytes.
    """

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self._errors: deque[str] = deque(maxlen=20)
        self.clear()

    def clear(self) -> None:
        """Forget everything that earlier builds logged."""
        self._errors.clear()
        self.layers, self.scratch = "", list[int]()

    def log(self, severity: trt.ILogger.Severity, msg: str) -> None:
        """Called by TensorRT, from any thread."""
        if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
            self._errors.append(" ".join(msg.split()))
        elif severity == trt.ILogger.Severity.WARNING and not msg.endswith("has Int64 binding."):
            log.info("TensorRT: %s", msg)
        elif msg.startswith(LAYERS_HEADING):
            self.layers = msg
        elif msg.startswith(SCRATCH_HEADING):
            self.scratch.append(int(msg.removeprefix(SCRATCH_HEADING).split()[0]))

    def reason(self) -> str:
        """The first error that is not about a missing driver, on one line. Forgets all errors."""
        errors = list(self._errors)
        self._errors.clear()
        first = next((error for error in errors if NO_DRIVER not in error), *errors[:1] or ["TensorRT gives no reason"])
        out_of_memory = any("outofmemory" in error.lower().replace(" ", "") for error in errors)
        return f"out of memory ({first})" if out_of_memory else first


LOGGER = Logger()


def create_runtime() -> trt.Runtime:
    """A runtime to load plans with; it refuses host code in plans. Raises `UserError` if CUDA does not start."""
    try:
        return trt.Runtime(LOGGER)
    except TypeError:  # what the bindings raise when the library returns a null pointer
        raise UserError(f"{NAME} cannot start here: {LOGGER.reason()}") from None
