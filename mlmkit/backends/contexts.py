"""Execution contexts of a loaded TensorRT plan: each with its own stream and memory, used by one thread at a time."""

import threading
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mlmkit.backends import Batch
from mlmkit.backends.cuda import ALIGNMENT, Arena, Stream
from mlmkit.backends.fitting import Shape, shape_of
from mlmkit.backends.trt import trt
from mlmkit.errors import CheckError, UserError


class Lane:
    """One execution context. It keeps the profile that it was made for: a change would throw away all its shapes."""

    def __init__(
        self, context: trt.IExecutionContext, profile: int, dtypes: dict[str, np.dtype], outputs: list[str]
    ) -> None:
        self._context, self._stream = context, Stream()
        if self._context is None or not self._context.set_optimization_profile_async(profile, int(self._stream)):
            raise UserError("the GPU has no room for another execution context: stop what else runs on it")
        self._stream.synchronize()
        self._dtypes, self._output_names = dtypes, outputs
        self._input_arena, self._output_arena = Arena(), Arena()
        self._inputs: list[_Slot] = []
        self._outputs: list[_Slot] = []
        self._shape: Shape | None = None
        self.lock = threading.Lock()

    def run(self, batch: Batch) -> dict[str, NDArray[Any]]:
        """What the plan computes of a batch that its profile holds, as new arrays. Hold `lock`. Raises `CheckError`."""
        if self._shape != shape_of(batch):
            self._prepare(batch)
        for slot in self._inputs:
            slot.view(self._input_arena)[...] = getattr(batch, slot.name)
        self._input_arena.to_device(self._inputs[-1].end, self._stream)
        if not self._context.execute_async_v3(int(self._stream)):
            raise CheckError("the execution was refused")
        self._output_arena.to_host(self._outputs[-1].end, self._stream)
        self._stream.synchronize()
        return {slot.name: slot.view(self._output_arena).copy() for slot in self._outputs}

    def _prepare(self, batch: Batch) -> None:
        """Tell the context the shapes, and then where everything lies."""
        self._shape = None
        shapes = [(name, values.shape) for name, values in batch._asdict().items()]
        for name, shape in shapes:
            if not self._context.set_input_shape(name, shape):
                raise CheckError(f"{name} was refused with shape {shape}")
        self._inputs = self._lay_out(shapes)
        self._outputs = self._lay_out([(name, self._output_shape(name)) for name in self._output_names])
        for arena, slots in ((self._input_arena, self._inputs), (self._output_arena, self._outputs)):
            arena.reserve(slots[-1].end)
            for slot in slots:
                if not self._context.set_tensor_address(slot.name, arena.device + slot.offset):
                    raise CheckError(f"the address of {slot.name} was refused")
        self._shape = shape_of(batch)

    def _output_shape(self, name: str) -> tuple[int, ...]:
        shape = tuple(self._context.get_tensor_shape(name))
        if min(shape) < 0:
            raise CheckError(f"the shape of {name} is not settled by those of the inputs: {shape}")
        return shape

    def _lay_out(self, shapes: list[tuple[str, tuple[int, ...]]]) -> "list[_Slot]":
        slots, offset = [], 0
        for name, shape in shapes:
            slots.append(_Slot(name, offset, shape, self._dtypes[name]))
            offset = -(-slots[-1].end // ALIGNMENT) * ALIGNMENT
        return slots


@dataclass(frozen=True)
class _Slot:
    """Where a tensor lies in its arena."""

    name: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def end(self) -> int:
        return self.offset + int(np.prod(self.shape)) * self.dtype.itemsize

    def view(self, arena: Arena) -> NDArray[Any]:
        return arena.view(self.offset, self.shape, self.dtype)
