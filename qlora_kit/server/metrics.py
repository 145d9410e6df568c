"""What the server counts, in Prometheus' format."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from qlora_kit.server.protocol import Load

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)


class ServerMetrics:
    """The counters of one server. Labels are taken from fixed sets and from the names in the store only."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self.requests = Counter("qlora_kit_requests", "HTTP requests", ["route", "status"], registry=self._registry)
        self.seconds = Histogram(
            "qlora_kit_request_seconds",
            "From a request to the end of its response",
            ["route"],
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.first_token_seconds = Histogram(
            "qlora_kit_first_token_seconds",
            "From a streamed request to the first piece of its answer",
            buckets=_SECONDS,
            registry=self._registry,
        )
        self.tokens = Counter(
            "qlora_kit_tokens", "Tokens of prompts and answers", ["model", "kind"], registry=self._registry
        )
        self.disconnects = Counter(
            "qlora_kit_disconnects", "Requests whose client went before the end", registry=self._registry
        )
        self._gauges = {
            "running": Gauge("qlora_kit_answers_running", "Answers in the running batch", registry=self._registry),
            "waiting": Gauge("qlora_kit_answers_waiting", "Answers that wait for a place", registry=self._registry),
            "kv_bytes": Gauge("qlora_kit_kv_bytes", "Memory of keys and values", registry=self._registry),
            "kv_budget_bytes": Gauge("qlora_kit_kv_budget_bytes", "What they may take", registry=self._registry),
            "adapters": Gauge("qlora_kit_adapters", "Adapters that are served", registry=self._registry),
        }

    def count_tokens(self, model: str, *, prompt: int, completion: int) -> None:
        """Add one answer's tokens."""
        self.tokens.labels(model, "prompt").inc(prompt)
        self.tokens.labels(model, "completion").inc(completion)

    def text(self, load: Load, *, adapters: int) -> bytes:
        """The whole exposition, with the figures of this moment."""
        now = {
            "running": load.running,
            "waiting": load.waiting,
            "kv_bytes": load.kv_bytes,
            "kv_budget_bytes": load.kv_budget_bytes,
            "adapters": adapters,
        }
        for name, value in now.items():
            self._gauges[name].set(value)
        return generate_latest(self._registry)
