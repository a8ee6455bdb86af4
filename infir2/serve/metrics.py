"""What the server counts, in Prometheus' text format."""

from collections import Counter, defaultdict

from infir2.rollout.interface import EngineStats

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """Counters of the HTTP side; they belong to the event loop's thread."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By (route, status)."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """Time until the last byte was handed over, by route."""
        self.in_flight = 0
        self.disconnects = 0
        """Requests whose client went away before its answer was whole."""
        self.faults = 0
        """Steps of the engine that failed; the requests in them were answered with 500."""

    def render(self, stats: EngineStats, open_streams: int) -> str:
        lines: list[str] = []

        def add(name: str, kind: str, text: str, *samples: tuple[str, float]) -> None:
            full = f"infir2_{name}"
            lines.extend([f"# HELP {full} {text}", f"# TYPE {full} {kind}"])
            lines.extend(f"{full}{labels} {value:.17g}" for labels, value in samples)

        requests = sorted(self.requests.items())
        labelled = [(f'{{route="{route}",status="{status}"}}', count) for (route, status), count in requests]
        add("http_requests_total", "counter", "Requests answered.", *labelled)
        seconds = [(f'{{route="{route}"}}', value) for route, value in sorted(self.seconds.items())]
        add("http_request_seconds_total", "counter", "Time spent on requests, to their last byte.", *seconds)
        add("http_requests_in_flight", "gauge", "Requests being answered.", ("", self.in_flight))
        add("client_disconnects_total", "counter", "Clients that left before their answer.", ("", self.disconnects))
        add("engine_faults_total", "counter", "Steps of the engine that failed.", ("", self.faults))
        add("open_streams", "gauge", "Requests that the engine owes tokens.", ("", open_streams))
        add("sequences_running", "gauge", "Samples being generated.", ("", stats.running))
        add("sequences_waiting", "gauge", "Samples waiting for room.", ("", stats.waiting))
        add("cache_blocks_held", "gauge", "Blocks of the key-value cache that samples hold.", ("", stats.blocks_held))
        add("cache_blocks", "gauge", "Blocks of the key-value cache.", ("", stats.num_blocks))
        add("cache_bytes", "gauge", "Memory of the key-value cache.", ("", stats.cache_bytes))
        add("computed_tokens_total", "counter", "Tokens that went through the model.", ("", stats.computed_tokens))
        add("generated_tokens_total", "counter", "Tokens sampled.", ("", stats.generated_tokens))
        add("cached_tokens_total", "counter", "Prompt tokens found in the cache.", ("", stats.cached_tokens))
        add(
            "preemptions_total",
            "counter",
            "Samples computed again for want of blocks.",
            ("", stats.preemptions),
        )
        add("engine_steps_total", "counter", "Forward passes.", ("", stats.steps))
        add("engine_seconds_total", "counter", "Time spent in forward passes.", ("", stats.seconds))
        return "\n".join(lines) + "\n"
