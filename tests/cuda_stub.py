# ruff: noqa: N801, N802, N803, N815
"""A stand-in for `cuda.bindings.runtime`, and the machine that it and the one for `tensorrt` run on.

See tensorrt_stub.py for what they are for. The "device" is host memory that only device calls may touch; work waits on
its stream until that is synchronised.
"""

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any


@dataclass
class Machine:
    """What the stand-ins run on, what goes wrong there, and what was called."""

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
KEPT: list[Any] = []  # no address comes twice, so that a late finalizer frees nothing of another test


class cudaError_t(IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorInsufficientDriver = 35


class cudaMemcpyKind(IntEnum):
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2


OK = cudaError_t.cudaSuccess


class cudaDeviceProp:
    name: bytes
    major: int
    minor: int


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
    properties = cudaDeviceProp()
    properties.name = MACHINE.gpu.encode()
    properties.major, properties.minor = MACHINE.capability
    return OK, properties


def allocate(kind: str, size: int) -> tuple[Any, ...]:
    used = sum(taken for _, taken in MACHINE.allocations.values())
    if used + size > MACHINE.memory:
        return cudaError_t.cudaErrorMemoryAllocation, None
    buffer = ctypes.create_string_buffer(b"\xee" * size, size)  # never zeros by luck
    KEPT.append(buffer)
    MACHINE.allocations[ctypes.addressof(buffer)] = (kind, size)
    return OK, ctypes.addressof(buffer)


def cudaMalloc(size):
    return allocate("device", size)


def cudaMallocHost(size):
    return allocate("host", size)


def cudaFree(devPtr):
    return free("device", devPtr)


def cudaFreeHost(ptr):
    return free("host", ptr)


def free(kind: str, address: int) -> tuple[Any]:
    found = MACHINE.allocations.pop(address, None)  # None: a finalizer that comes a machine later
    assert found is None or found[0] == kind
    return (OK,)


def check_memory(kind: str, address: int, size: int) -> None:
    for begin, (found, length) in list(MACHINE.allocations.items()):
        if begin <= address and address + size <= begin + length:
            assert found == kind, f"{found} memory where {kind} memory must be"
            return
    raise AssertionError(f"{size} bytes at {address:#x} are not in live memory")


def check_alignment(address: int) -> None:
    """Offsets must keep to 256 bytes, as an allocation's own address does on a device."""
    begin = max(start for start in MACHINE.allocations if start <= address)
    assert (address - begin) % 256 == 0


def cudaMemcpyAsync(dst, src, count, kind, stream):
    kinds = ("device", "host") if kind == cudaMemcpyKind.cudaMemcpyHostToDevice else ("host", "device")

    def work() -> None:
        check_memory(kinds[0], dst, count)
        check_memory(kinds[1], src, count)
        ctypes.memmove(dst, src, count)

    stream_of(stream).waiting.append(work)
    return (OK,)


def cudaStreamCreateWithFlags(flags):
    assert flags == 1, "the default kind of stream waits for others"
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


CUDA = [
    cudaError_t,
    cudaMemcpyKind,
    cudaDeviceProp,
    cudaStream_t,
    cudaGetErrorString,
    cudaGetDeviceCount,
    cudaGetDeviceProperties,
    cudaMalloc,
    cudaMallocHost,
    cudaFree,
    cudaFreeHost,
    cudaMemcpyAsync,
    cudaStreamCreateWithFlags,
    cudaStreamDestroy,
    cudaStreamSynchronize,
]
