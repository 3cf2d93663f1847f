"""Memory and streams of the first CUDA device, through cuda-python: a plan runs without torch."""

import ctypes
import weakref
from typing import Any, NamedTuple

import numpy as np
from cuda.bindings import runtime as cudart  # pyright: ignore[reportMissingImports, reportAttributeAccessIssue]
from numpy.typing import NDArray

from mlmkit.errors import CheckError, UserError

ALIGNMENT = 256  # bytes; what cudaMalloc itself keeps to


class Gpu(NamedTuple):
    """`compute_capability` as in "9.0"."""

    name: str
    compute_capability: str


def find_gpu() -> Gpu:
    """The first CUDA device. Raises `UserError` where no driver or no device answers."""
    status, count = cudart.cudaGetDeviceCount()
    if status != cudart.cudaError_t.cudaSuccess or not count:
        raise UserError("no CUDA driver or no GPU answers here")
    properties: cudart.cudaDeviceProp = check(cudart.cudaGetDeviceProperties(0))
    return Gpu(properties.name.rstrip(b"\0").decode(), f"{properties.major}.{properties.minor}")


def check(result: tuple[Any, ...]) -> Any:
    """The value of a CUDA runtime call, each of which returns its status first.

    Raises `UserError` when the GPU is out of memory and `CheckError` for anything else that failed.
    """
    status, *values = result
    if status != cudart.cudaError_t.cudaSuccess:
        _, text = cudart.cudaGetErrorString(status)
        if status == cudart.cudaError_t.cudaErrorMemoryAllocation:
            raise UserError("the GPU is out of memory: stop what else runs on it, or ask for smaller batches")
        raise CheckError(f"CUDA failed: {text.decode()}")
    return values[0] if values else None


class Stream:
    """A stream of its own: work on it waits for nothing else on the device, and nothing else for it."""

    def __init__(self) -> None:
        self._handle: cudart.cudaStream_t = check(cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        weakref.finalize(self, cudart.cudaStreamDestroy, self._handle)

    def __int__(self) -> int:
        return int(self._handle)

    def synchronize(self) -> None:
        """Wait for everything that was put on the stream."""
        check(cudart.cudaStreamSynchronize(self._handle))


class Arena:
    """One stretch of pinned host memory and its twin on the device, kept from call to call and grown when needed.

    All inputs of a run share one arena and all outputs another, so that each way is one copy.
    """

    def __init__(self) -> None:
        self.size = 0
        self.host = self.device = 0
        self._release: list[weakref.finalize] = []

    def reserve(self, size: int) -> None:
        """Have room for `size` bytes. Nothing may be under way on the memory."""
        if size <= self.size:
            return
        for release in self._release:
            release()
        self._release, self.size = [], 0
        grown = 1 << (size - 1).bit_length()
        self.host = int(check(cudart.cudaMallocHost(grown)))
        self._release.append(weakref.finalize(self, cudart.cudaFreeHost, self.host))
        self.device = int(check(cudart.cudaMalloc(grown)))
        self._release.append(weakref.finalize(self, cudart.cudaFree, self.device))
        self.size = grown

    def view(self, offset: int, shape: tuple[int, ...], dtype: np.dtype) -> NDArray[Any]:
        """The pinned memory at `offset` as an array, no copy: valid until the arena grows."""
        count = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_uint8 * count).from_address(self.host + offset)
        return np.ctypeslib.as_array(memory).view(dtype).reshape(shape)

    def to_device(self, size: int, stream: Stream) -> None:
        """Put the copy of the first `size` bytes on the stream."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        check(cudart.cudaMemcpyAsync(self.device, self.host, size, kind, int(stream)))

    def to_host(self, size: int, stream: Stream) -> None:
        """Put the copy of the first `size` bytes on the stream."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        check(cudart.cudaMemcpyAsync(self.host, self.device, size, kind, int(stream)))
