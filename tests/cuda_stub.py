# ruff: noqa: N801, N802, N815, N816
"""A stand-in for `cuda.bindings.runtime`, and the machine that it and tensorrt_stub.py run on.

"Device" memory is host memory that only device calls may touch. Work waits on its stream until that is synchronised.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from functools import partial
from types import SimpleNamespace
from typing import Any


@dataclass
class Machine:
    """What is installed on the machine, what fails there, and what was called."""

    version: str = "11.4.0.106"
    gpu: str = "Stand-in GPU"
    capability: tuple[int, int] = (9, 0)
    driver: bool = True
    starts: bool = True
    memory: int = 1 << 30
    indices: str = "INT64"
    load_error: str = ""
    refuses: str = ""
    host_tensor: str = ""
    validity: tuple[str, int] = ("VALID", 0)
    allocations: dict[int, tuple[str, int]] = field(default_factory=dict)
    streams: dict[int, "cudaStream_t"] = field(default_factory=dict)
    calls: list[tuple[str, Any]] = field(default_factory=list)

    def called(self, name: str) -> list[Any]:
        return [arguments for called, arguments in self.calls if called == name]


MACHINE = Machine()
KEPT: list[Any] = []  # buffers are never freed, so a late finalizer cannot free an address of another test


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


OK = cudaError_t.cudaSuccess
cudaStreamNonBlocking = 1


class cudaDeviceProp:
    """Named in an annotation."""


class cudaStream_t:
    def __init__(self) -> None:
        self.waiting: list[Callable[[], None]] = []

    def __int__(self) -> int:
        return id(self)


def stream_of(handle: Any) -> cudaStream_t:
    return MACHINE.streams[int(handle)]


def cudaGetErrorString(error):
    return OK, error.name.encode()


def cudaGetDeviceCount():
    return (OK, 1) if MACHINE.driver else (cudaError_t.cudaErrorInsufficientDriver, None)


def cudaGetDeviceProperties(device):
    major, minor = MACHINE.capability
    return OK, SimpleNamespace(name=MACHINE.gpu.encode(), major=major, minor=minor)


def allocate(kind: str, size: int) -> tuple[Any, ...]:
    if sum(taken for _, taken in MACHINE.allocations.values()) + size > MACHINE.memory:
        return cudaError_t.cudaErrorMemoryAllocation, None
    buffer = ctypes.create_string_buffer(b"\xee" * size, size)  # never zeros by luck
    KEPT.append(buffer)
    MACHINE.allocations[ctypes.addressof(buffer)] = (kind, size)
    return OK, ctypes.addressof(buffer)


def free(kind: str, address: int) -> tuple[Any]:
    freed = MACHINE.allocations.pop(address, None)  # None: a finalizer from an earlier test
    assert freed is None or freed[0] == kind
    return (OK,)


cudaMalloc, cudaMallocHost = partial(allocate, "device"), partial(allocate, "host")
cudaFree, cudaFreeHost = partial(free, "device"), partial(free, "host")


def check_memory(kind: str, address: int, size: int, alignment: int = 1) -> None:
    for begin, (found, length) in list(MACHINE.allocations.items()):
        if begin <= address and address + size <= begin + length:
            assert found == kind, f"{found} memory where {kind} memory must be"
            assert (address - begin) % alignment == 0
            return
    raise AssertionError(f"{size} bytes at {address:#x} are not in live memory")


def cudaMemcpyAsync(dst, src, count, kind, stream):
    kinds = ("device", "host") if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else ("host", "device")

    def work() -> None:
        check_memory(kinds[0], dst, count)
        check_memory(kinds[1], src, count)
        ctypes.memmove(dst, src, count)

    stream_of(stream).waiting.append(work)
    return (OK,)


def cudaStreamCreateWithFlags(flags):
    assert flags == cudaStreamNonBlocking
    stream = cudaStream_t()
    MACHINE.streams[id(stream)] = stream
    return OK, stream


def cudaStreamDestroy(stream):
    MACHINE.streams.pop(int(stream), None)
    return (OK,)


def cudaStreamSynchronize(stream):
    waiting, stream_of(stream).waiting = stream_of(stream).waiting, []
    for work in waiting:
        work()
    return (OK,)
