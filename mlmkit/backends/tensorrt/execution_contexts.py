"""Execution contexts of a loaded TensorRT plan, each with its own stream and memory."""

import threading
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends.protocol import OUTPUTS, Batch
from mlmkit.backends.tensorrt.batch_splitting import Shape, shape_of
from mlmkit.backends.tensorrt.bindings import trt
from mlmkit.backends.tensorrt.cuda import Arena, Stream
from mlmkit.errors import CheckError, UserError


class ExecutionContext:
    """One execution context of a profile. Only the thread that holds `lock` may use it.

    It never changes its profile, because TensorRT would then forget all shapes. Raises `UserError` if the GPU has no
    memory left for it.
    """

    def __init__(self, context: trt.IExecutionContext, profile: int, dtypes: dict[str, np.dtype]) -> None:
        self._context, self._stream = context, Stream()
        if self._context is None or not self._context.set_optimization_profile_async(profile, int(self._stream)):
            raise UserError("the GPU has no memory for another execution context: stop other programs that use it")
        self._stream.synchronize()
        self._dtypes = dtypes
        self._inputs, self._outputs = Arena(), Arena()
        self._shape: Shape | None = None
        self.lock = threading.Lock()

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """Score a batch that fits the profile. Returns the outputs as new arrays. Raises `CheckError` on failure."""
        if self._shape != shape_of(batch):
            self._prepare(batch)
        for name, view in self._inputs.views.items():
            view[...] = getattr(batch, name)
        self._inputs.to_device(self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise CheckError("TensorRT refused to run it")
        self._outputs.to_host(self._stream)
        self._stream.synchronize()
        return {name: view.copy() for name, view in self._outputs.views.items()}

    def _prepare(self, batch: Batch) -> None:
        """Set the shapes of the inputs, then the address of every tensor."""
        self._shape = None
        for name, values in batch._asdict().items():
            if not self._context.set_input_shape(name, values.shape):
                raise CheckError(f"TensorRT refused {name} with shape {values.shape}")
        self._inputs.lay_out({name: (values.shape, self._dtypes[name]) for name, values in batch._asdict().items()})
        self._outputs.lay_out({name: (self._output_shape(name), self._dtypes[name]) for name in OUTPUTS})
        for name, address in (self._inputs.addresses | self._outputs.addresses).items():
            if not self._context.set_tensor_address(name, address):
                raise CheckError(f"TensorRT refused the address of {name}")
        self._shape = shape_of(batch)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape) < 0:
            raise CheckError(f"the shape of {name} does not follow from those of the inputs: {shape}")
        return shape
