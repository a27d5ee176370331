"""`/metrics` for Prometheus: requests, tokens, queue, time to first token, per model. Names that nobody serves never
become labels."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import suppress

from prometheus_client import CollectorRegistry, Counter, Histogram, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import generate_latest
from prometheus_client.registry import Collector

from lora_tune.serving.backend import Backend, Finished

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_OTHER = "other"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)
_METHODS = ("GET", "HEAD", "POST", "OPTIONS", "PUT", "PATCH", "DELETE")


class Metrics:
    """The numbers of one server. `routes` are the paths that may be labels."""

    def __init__(self, backend: Backend, *, routes: Iterable[str]) -> None:
        self._registry = CollectorRegistry()
        self._routes = frozenset(routes)
        self._requests = Counter(
            "lora_tune_requests", "HTTP requests by route and status.", ("method", "route", "status"),
            registry=self._registry,
        )  # fmt: skip
        self._took = Histogram(
            "lora_tune_request_seconds", "Seconds from a request's head to the end of its answer.", ("route",),
            buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._answers = Counter(
            "lora_tune_answers", "Answers by model and how they ended.", ("model", "reason"), registry=self._registry
        )
        self._prompt = Counter(
            "lora_tune_prompt_tokens", "Tokens of prompts that were answered.", ("model",), registry=self._registry
        )
        self._completion = Counter(
            "lora_tune_completion_tokens", "Tokens of answers.", ("model",), registry=self._registry
        )
        self._first = Histogram(
            "lora_tune_time_to_first_token_seconds", "Seconds until an answer's first token, waiting included.",
            ("model",), buckets=_SECONDS, registry=self._registry,
        )  # fmt: skip
        self._whole = Histogram(
            "lora_tune_answer_seconds", "Seconds until an answer was whole.", ("model",), buckets=_SECONDS,
            registry=self._registry,
        )  # fmt: skip
        self._registry.register(_Engine(backend))
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)

    def answered(self, method: str, path: str, status: int, seconds: float) -> None:
        """Count an HTTP request."""
        route = path if path in self._routes else _OTHER
        self._requests.labels(method if method in _METHODS else _OTHER, route, str(int(status))).inc()
        self._took.labels(route).observe(seconds)

    def first_token(self, model: str, seconds: float) -> None:
        """Note how long the first token of an answer took."""
        self._first.labels(model).observe(seconds)

    def finished(self, model: str, end: Finished, seconds: float) -> None:
        """Count a whole answer and its tokens."""
        self._answers.labels(model, end.reason).inc()
        self._prompt.labels(model).inc(end.prompt_tokens)
        self._completion.labels(model).inc(end.completion_tokens)
        self._whole.labels(model).observe(seconds)

    def forget(self, model: str) -> None:
        """Drop the series of an adapter that is served no more."""
        for metric in (self._answers, self._prompt, self._completion, self._first, self._whole):
            with suppress(KeyError):
                metric.remove_by_labels({"model": model})

    def page(self) -> bytes:
        """All numbers in Prometheus' text format."""
        return generate_latest(self._registry)


class _Engine(Collector):
    """What the engine says of itself, read when the page is asked for."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def describe(self) -> Iterable[Metric]:
        return ()  # so that registering asks the engine nothing

    def collect(self) -> Iterator[Metric]:
        now = self._backend.statistics()
        for name, text, value in (
            ("running", "Requests that are being answered.", now.running),
            ("waiting", "Requests in the queue.", now.waiting),
            ("queue_size", "Requests that may wait.", now.queue),
        ):
            yield GaugeMetricFamily(f"lora_tune_engine_{name}", text, value=value)
        for name, text, number in (
            ("steps", "Decoding steps.", float(now.steps)),
            ("step_rows", "Rows of all decoding steps; over steps it is the mean batch.", float(now.step_rows)),
            ("step_seconds", "Seconds of all decoding steps.", now.step_s),
            ("prefill_tokens", "Tokens of prompts that were read.", float(now.prefill_tokens)),
        ):
            yield CounterMetricFamily(f"lora_tune_engine_{name}", text, value=number)
        running = GaugeMetricFamily("lora_tune_model_running", "Requests being answered, by model.", labels=["model"])
        waiting = GaugeMetricFamily("lora_tune_model_waiting", "Requests in the queue, by model.", labels=["model"])
        cancelled = CounterMetricFamily("lora_tune_model_cancelled", "Cancelled requests, by model.", labels=["model"])
        failed = CounterMetricFamily("lora_tune_model_failed", "Requests the engine failed on.", labels=["model"])
        for model, counters in now.models.items():
            running.add_metric([model], counters.running)
            waiting.add_metric([model], counters.waiting)
            cancelled.add_metric([model], counters.cancelled)
            failed.add_metric([model], counters.failed)
        yield from (running, waiting, cancelled, failed)
