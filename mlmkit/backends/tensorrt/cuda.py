"""Memory and streams of the first CUDA device. Uses cuda-python, so that a plan runs without torch."""

import ctypes
import weakref
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import runtime as cudart  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from numpy.typing import NDArray

from mlmkit.errors import CheckError, UserError

ALIGNMENT = 256  # bytes, the alignment of cudaMalloc


class Gpu(NamedTuple):
    """A GPU; its `compute_capability` is a string such as "9.0"."""

    name: str
    compute_capability: str


def find_gpu() -> Gpu:
    """The first CUDA device. Raises `UserError` if there is no driver or no device."""
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        raise UserError("there is no CUDA driver or no GPU here")
    properties: cudart.cudaDeviceProp = check(cudart.cudaGetDeviceProperties(0))
    return Gpu(properties.name.rstrip(b"\0").decode(), f"{properties.major}.{properties.minor}")


def check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call, which returns its status first.

    Raises `UserError` if the GPU is out of memory and `CheckError` for any other failure.
    """
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise UserError("the GPU is out of memory: stop other programs that use it, or use smaller batches")
        raise CheckError(f"CUDA failed: {text.decode()}")
    return values[0] if values else None


class Stream:
    """A non-blocking stream: its work and other work on the device do not wait for each other."""

    def __init__(self) -> None:
        self._handle: cudart.cudaStream_t = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        weakref.finalize(self, cudart.cudaStreamDestroy, self._handle)

    def __int__(self) -> int:
        return int(self._handle)

    def synchronize(self) -> None:
        """Wait until all work on the stream is done."""
        check(cudart.cudaStreamSynchronize(self._handle))


class Arena:
    """Pinned host memory and device memory of the same layout, for all inputs or all outputs of a call.

    Sharing one block means one copy in each direction. The memory is kept between calls and grows when needed.
    `views` holds each tensor on the host as an array, `addresses` its address on the device.
    """

    def __init__(self) -> None:
        self.views: dict[str, NDArray[Any]] = {}
        self.addresses: dict[str, int] = {}
        self._host = self._device = self._used = self._size = 0
        self._finalizers: list[weakref.finalize] = []

    def lay_out(self, tensors: dict[str, tuple[tuple[int, ...], np.dtype]]) -> None:
        """Make room for tensors with these shapes and types. No work may be using the memory; views become invalid."""
        offsets, self._used = {}, 0
        for name, (shape, dtype) in tensors.items():
            offsets[name] = -(-self._used // ALIGNMENT) * ALIGNMENT
            self._used = offsets[name] + int(np.prod(shape)) * dtype.itemsize
        self._reserve(self._used)
        self.addresses = {name: self._device + offset for name, offset in offsets.items()}
        self.views = {}
        for name, (shape, dtype) in tensors.items():
            memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._host + offsets[name])
            self.views[name] = np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def _reserve(self, size: int) -> None:
        """Grow to at least `size` bytes, to a power of two."""
        if size <= self._size:
            return
        for free in self._finalizers:
            free()
        self._finalizers, self._size = [], 0
        grown = 1 << (size - 1).bit_length()
        self._host = int(check(cudart.cudaMallocHost(grown)))
        self._finalizers.append(weakref.finalize(self, cudart.cudaFreeHost, self._host))
        self._device = int(check(cudart.cudaMalloc(grown)))
        self._finalizers.append(weakref.finalize(self, cudart.cudaFree, self._device))
        self._size = grown

    def to_device(self, stream: Stream) -> None:
        """Queue the copy of all tensors to the device."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(self._device, self._host, self._used, kind, int(stream)))

    def to_host(self, stream: Stream) -> None:
        """Queue the copy of all tensors to the host."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(self._host, self._device, self._used, kind, int(stream)))
