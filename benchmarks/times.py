"""When tokens came, and what follows from it. Standard library only: peers' drivers import it."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

__all__ = ["Figures", "RequestTimes", "TimedRequest", "burst", "figures", "median", "percentile"]


@dataclass(frozen=True, slots=True)
class TimedRequest:
    """One request of a load.

    Attributes:
        at_s: when it arrives, in seconds from the start of the load.
        prompt: token ids.
        tokens: output tokens; the model's end tokens do not end it.
    """

    at_s: float
    prompt: tuple[int, ...]
    tokens: int


@dataclass(frozen=True, slots=True)
class RequestTimes:
    """One request that was answered: when it was submitted and when each output token came.

    All in seconds from the start of its load.
    """

    submitted_s: float
    tokens_s: tuple[float, ...]

    @property
    def first_token_s(self) -> float:
        """Time to the first token."""
        return self.tokens_s[0] - self.submitted_s

    @property
    def intervals_s(self) -> tuple[float, ...]:
        """Times between one token and the next."""
        return tuple(b - a for a, b in zip(self.tokens_s, self.tokens_s[1:], strict=False))


@dataclass(frozen=True, slots=True)
class Figures:
    """What one run of a load reached.

    Attributes:
        tokens_per_second: output tokens over the time from the first submission to the last token.
        first_token_mean_s: time to the first token, mean over the requests; likewise `p50`, `p99`
            and `max`.
        token_mean_s: mean time of an output token after the first, over all requests.
        token_p50_s: of all intervals between tokens; likewise `p99`.
    """

    requests: int
    output_tokens: int
    seconds: float
    tokens_per_second: float
    first_token_mean_s: float
    first_token_p50_s: float
    first_token_p99_s: float
    first_token_max_s: float
    token_mean_s: float
    token_p50_s: float
    token_p99_s: float

    def to_document(self) -> dict[str, float]:
        """As JSON values."""
        return asdict(self)


def burst(prompts: Iterable[Sequence[int]], tokens: int) -> list[TimedRequest]:
    """A load whose requests all arrive at once."""
    return [TimedRequest(0.0, tuple(prompt), tokens) for prompt in prompts]


def figures(times: Sequence[RequestTimes]) -> Figures:
    """The figures of one run; every request must have at least one token."""
    tokens = sum(len(request.tokens_s) for request in times)
    begin = min(request.submitted_s for request in times)
    seconds = max(request.tokens_s[-1] for request in times) - begin
    first = [request.first_token_s for request in times]
    between = [interval for request in times for interval in request.intervals_s] or [0.0]
    return Figures(
        requests=len(times),
        output_tokens=tokens,
        seconds=seconds,
        tokens_per_second=tokens / seconds,
        first_token_mean_s=statistics.fmean(first),
        first_token_p50_s=percentile(first, 50),
        first_token_p99_s=percentile(first, 99),
        first_token_max_s=max(first),
        token_mean_s=statistics.fmean(between),
        token_p50_s=percentile(between, 50),
        token_p99_s=percentile(between, 99),
    )


def median(runs: Sequence[Figures]) -> Figures:
    """The run whose tokens per second are the median: its figures belong together."""
    ordered = sorted(runs, key=lambda run: run.tokens_per_second)
    return ordered[(len(ordered) - 1) // 2]


def percentile(values: Iterable[float], percent: float) -> float:
    """The smallest value that at least `percent` of the values do not exceed (nearest rank)."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, int(rank) - 1)]
