"""Metrics for Prometheus."""

from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256)
SHARES = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 1.0)

disable_created_metrics()  # else each metric gets a second series with its start time


class Metrics:
    """The server's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        own: dict[str, Any] = {"registry": self.registry}
        self.in_flight = Gauge("mlmkit_requests_in_flight", "Requests being read, waiting or answered.", **own)
        self.queue_tokens = Gauge("mlmkit_queue_tokens", "Tokens in the queue.", **own)
        self._requests = Counter("mlmkit_requests", "Requests answered.", ["endpoint", "status"], **own)
        self._errors = Counter("mlmkit_errors", "Error answers.", ["endpoint", "error_type"], **own)
        self._latency = Histogram("mlmkit_request_seconds", "Head to answer.", ["endpoint"], buckets=SECONDS, **own)
        self._waits = Histogram("mlmkit_queue_seconds", "Arrival to first engine call.", buckets=SECONDS, **own)
        self._rows = Histogram("mlmkit_batch_rows", "Rows per engine call.", buckets=ROWS, **own)
        self._fill = Histogram(
            "mlmkit_batch_fill", "Share of a call's tokens that is not padding.", buckets=SHARES, **own
        )
        self._tokens = Counter("mlmkit_tokens", "Tokens through the engine, without padding.", **own)
        self._engine = Counter("mlmkit_engine_seconds", "Time in the engine.", **own)

    def count_request(self, endpoint: str, status: int, seconds: float, error_type: str) -> None:
        """Count an answered request. `error_type` is empty unless the answer is an error."""
        self._requests.labels(endpoint, str(status)).inc()
        self._latency.labels(endpoint).observe(seconds)
        if error_type:
            self._errors.labels(endpoint, error_type).inc()

    def count_wait(self, seconds: float) -> None:
        """Count the time that a request's first row spent in the queue."""
        self._waits.observe(seconds)

    def count_call(self, rows: int, tokens: int, padded: int, seconds: float) -> None:
        """Count an engine call: `tokens` without and `padded` with padding."""
        self._rows.observe(rows)
        self._fill.observe(tokens / padded)
        self._tokens.inc(tokens)
        self._engine.inc(seconds)

    def page(self) -> bytes:
        """All metrics in Prometheus's text format."""
        return generate_latest(self.registry)
