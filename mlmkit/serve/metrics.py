"""What Prometheus reads. With several workers the figures are shared through files, as prometheus_client does it."""

import os
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
    generate_latest,
    multiprocess,
)

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SHARED = "PROMETHEUS_MULTIPROC_DIR"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)


disable_created_metrics()  # a second series for each, which says when it began


class Metrics:
    """One set of figures a process."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        now: dict[str, Any] = own | {"multiprocess_mode": "livesum"}
        self._requests = Counter("mlmkit_requests", "Requests answered.", ["endpoint", "status"], **own)
        self._errors = Counter("mlmkit_errors", "Refusals by their name.", ["endpoint", "error_type"], **own)
        self._latency = Histogram("mlmkit_request_seconds", "Head to answer.", ["endpoint"], buckets=SECONDS, **own)
        self.in_flight = Gauge("mlmkit_requests_in_flight", "Being read, waiting or answered.", **now)
        self.queue_tokens = Gauge("mlmkit_queue_tokens", "Tokens that wait.", **now)
        self._waits = Histogram("mlmkit_queue_seconds", "Arrival to the first engine call.", buckets=SECONDS, **own)
        self._rows = Histogram("mlmkit_batch_rows", "Rows in a call of the engine.", buckets=ROWS, **own)
        self._fill = Histogram("mlmkit_batch_fill", "Share of a call that is no padding.", buckets=SHARES, **own)
        self._tokens = Counter("mlmkit_tokens", "Tokens through the engine, without padding.", **own)
        self._engine = Counter("mlmkit_engine_seconds", "Time in the engine.", **own)

    def saw_request(self, endpoint: str, status: int, seconds: float, error_type: str) -> None:
        """A request has been answered; `error_type` is empty unless it was refused."""
        self._requests.labels(endpoint, str(status)).inc()
        self._latency.labels(endpoint).observe(seconds)
        if error_type:
            self._errors.labels(endpoint, error_type).inc()

    def saw_wait(self, seconds: float) -> None:
        """A request's first row has left the queue."""
        self._waits.observe(seconds)

    def saw_batch(self, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """The engine has done a call of `rows` rows, `tokens` of whose `padded` tokens were no padding."""
        self._rows.observe(rows)
        self._fill.observe(tokens / padded)
        self._tokens.inc(tokens)
        self._engine.inc(seconds)

    def page(self) -> bytes:
        """The figures in Prometheus' text format, of all workers where there are several."""
        if SHARED not in os.environ:
            return generate_latest(self.registry)
        everyone = CollectorRegistry()
        multiprocess.MultiProcessCollector(everyone)
        return generate_latest(everyone)
