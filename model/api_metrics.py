"""Counters of the API server in the text format that Prometheus reads."""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

from .api_service import Service

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
# of an engine's counters: metric, attribute, what it counts
OF_ENGINES = (
    ("prompt_tokens_total", "n_prompt_tokens", "tokens of prompts"),
    ("cached_tokens_total", "n_cached_tokens", "of those, reused from earlier prompts"),
    ("generated_tokens_total", "n_new_tokens", "tokens of answers"),
    ("answers_finished_total", "n_finished", "answers that came to their end"),
    ("answers_cancelled_total", "n_cancelled", "answers that nobody waited for any more"),
    ("answers_failed_total", "n_failed", "answers that ended by an error"),
    ("steps_total", "n_steps", "steps of the engine"),
    ("busy_seconds_total", "busy_s", "time spent in steps"),
)


class Histogram:
    """How many values there were up to each bound, and their sum."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def add(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterable[str]:
        n = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            n += count
            yield f'{name}_bucket{{le="{bound}"}} {n}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {n}"


class Metrics:
    """What the server has seen since it was started."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()  # (route, status)
        self.first_token = Histogram(SECONDS)
        self.duration = Histogram(SECONDS)

    def text(self, service: Service) -> str:
        """Return all metrics."""
        out: list[str] = []

        def add(name: str, kind: str, help_text: str, values: Iterable[str]) -> None:
            out.extend((f"# HELP minimind_{name} {help_text}", f"# TYPE minimind_{name} {kind}"))
            out.extend(f"minimind_{value}" for value in values)

        add(
            "requests_total",
            "counter",
            "HTTP requests by route and status",
            (
                f'requests_total{{route="{route}",status="{status}"}} {n}'
                for (route, status), n in sorted(self.requests.items())
            ),
        )
        for name, histogram, help_text in (
            ("time_to_first_token_seconds", self.first_token, "from the request to its token"),
            (
                "request_duration_seconds",
                self.duration,
                "of requests that a model answered",
            ),
        ):
            add(name, "histogram", help_text, histogram.lines(name))
        # keys that are label values: \, " and line ends are escaped
        labels = {
            served: f'{{model="{name.translate(ESCAPES)}"}}'
            for name, served in service.models.items()
        }
        for name, attribute, help_text in OF_ENGINES:
            values = (
                f"{name}{label} {getattr(served.engine.counters, attribute)}"
                for served, label in labels.items()
            )
            add(name, "counter", help_text, values)
        for name, attribute, help_text in (
            ("requests_active", "n_active", "answers being made"),
            ("requests_queued", "n_queued", "answers that wait for a slot"),
        ):
            values = (f"{name}{lb} {getattr(s.engine, attribute)}" for s, lb in labels.items())
            add(name, "gauge", help_text, values)
        add("up", "gauge", "1: requests are taken", [f"up {int(service.state == 'ok')}"])
        return "\n".join(out) + "\n"


ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})
