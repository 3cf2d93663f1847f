"""The served model, and what all routes share: limits, metrics, the batcher and the threads for text work."""

import asyncio
import contextlib
import ctypes
import gc
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mlmkit import __version__
from mlmkit.backends import Backend, Batch
from mlmkit.serve.batcher import Batcher
from mlmkit.serve.examples import Example, read_example
from mlmkit.serve.limits import Limits
from mlmkit.serve.metrics import Metrics
from mlmkit.serve.schemas import Info

TEXT_THREADS = 2
TRIM_INTERVAL_SECONDS = 5.0


@dataclass
class Service:
    """One model on one server. The batcher exists from `start` on, and needs a running event loop."""

    backend: Backend
    limits: Limits
    metrics: Metrics
    log_texts: bool = False
    is_accepting: bool = False  # from the end of `start` until SIGTERM
    _batcher: Batcher | None = None
    _threads: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(TEXT_THREADS, "text"))

    @cached_property
    def name(self) -> str:
        """The model's name in paths of the Open Inference Protocol: the name of its folder."""
        path = self.backend.info.path
        return (Path(path).resolve().name if Path(path).exists() else path.replace("/", "--")) or "model"

    @cached_property
    def example(self) -> Example:
        """The example of the model's card."""
        return read_example(Path(self.backend.info.path), self.backend.tokenizer.mask_token)

    @cached_property
    def info(self) -> Info:
        """The answer of `/info`."""
        info, manifest = self.backend.info, self.backend.manifest
        return Info(
            **asdict(info),
            name=self.name,
            version=__version__,
            mask_token=self.backend.tokenizer.mask_token,
            example=self.example.text,
            language=self.example.language,
            backend=self.backend.name,
            device=self.backend.device,
            files=manifest.files if manifest else None,
            parity=manifest.parity if manifest else None,
            limits=asdict(self.limits),
        )

    @property
    def batcher(self) -> Batcher:
        """The batcher. Only for use after `start`."""
        assert self._batcher is not None
        return self._batcher

    @property
    def is_alive(self) -> bool:
        """Whether the batcher runs."""
        return self._batcher is not None and self._batcher.is_alive

    @property
    def is_ready(self) -> bool:
        """Whether clients should send requests here."""
        return self.is_accepting and self.is_alive

    @property
    def has_failed(self) -> bool:
        """Whether the batcher died of an error; only a new process helps."""
        return self._batcher is not None and self._batcher.failure is not None

    async def in_thread(self, function: Callable[..., Any], *arguments: Any, is_short: bool = False) -> Any:
        """Run text work in a thread, or on the event loop if it `is_short`: a thread costs 0.3 ms."""
        if is_short:
            return function(*arguments)
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *arguments)

    async def start(self) -> None:
        """Start the batcher and run the engine once, so that the first request does not wait for it to load."""
        bounds = self.limits.batch_tokens, self.limits.queue_tokens, self.limits.wait_seconds
        self._batcher = Batcher(self.backend, self.metrics, *bounds)
        ids = self.backend.tokenizer.frame(np.array([self.backend.tokenizer.mask_id]))[None]
        smallest = Batch(ids, np.ones_like(ids), np.zeros(1, np.int64), np.zeros(1, np.int64))
        await self._batcher.score([smallest])
        self._trimming = asyncio.create_task(self._trim_memory(smallest))
        gc.freeze()  # the loaded model stays: each collection of it stopped the server for 40 to 200 ms
        self.is_accepting = True

    async def stop(self) -> None:
        """Answer the requests in the queue, then stop."""
        self.is_accepting = False
        self._trimming.cancel()
        await self.batcher.close()
        self._threads.shutdown()

    async def _trim_memory(self, smallest: Batch) -> None:
        """Return freed memory to the system: ONNX Runtime and glibc each keep hundreds of MiB after large requests."""
        rate = self.batcher.rate
        while True:
            await asyncio.sleep(TRIM_INTERVAL_SECONDS)
            if self.batcher.rate != rate and self.backend.name == "onnx" and self.backend.device == "cpu":
                rate = self.batcher.rate
                await asyncio.to_thread(self.backend.shrink, smallest)  # pyright: ignore[reportAttributeAccessIssue]
            with contextlib.suppress(AttributeError, TypeError):  # not glibc
                await asyncio.to_thread(ctypes.CDLL(None).malloc_trim, 0)
