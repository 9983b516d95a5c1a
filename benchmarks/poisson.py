"""Requests of mixed lengths that arrive at random, at a share of what the engine can serve.

A burst of the same mix tells the capacity in requests a second. Then requests arrive with
exponential gaps (a Poisson process) for some minutes. Every one must be answered in full, and
resident memory must not grow; its slope is taken over the second half, when all has been touched.
"""

from __future__ import annotations

import random

from benchmarks.checkpoint import CACHE
from benchmarks.driver import Driver
from benchmarks.engine import engine_spec
from benchmarks.memory import slope
from benchmarks.options import common_parser, json_path, model_path, prompts
from benchmarks.report import print_table, write_json
from benchmarks.times import TimedRequest, figures

__all__ = ["main"]


def main() -> None:
    """Measures and reports."""
    parser = common_parser("poisson", __doc__)
    parser.add_argument("--minutes", type=float, default=3.0)
    parser.add_argument("--share", type=float, default=0.7, help="of the capacity")
    parser.add_argument("--sequences", type=int, default=32, help="most at once")
    parser.add_argument("--longest-input", type=int, default=512)
    parser.add_argument("--longest-output", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    chooser = random.Random(arguments.seed)

    def request(at_s: float) -> TimedRequest:
        # Spread evenly on a logarithmic scale: many short ones, some long ones.
        longest_input, longest_output = arguments.longest_input, arguments.longest_output
        length = round(longest_input ** chooser.uniform(0.5, 1.0))
        (prompt,) = prompts(1, length, arguments.vocabulary, seed=chooser.randrange(2**32))
        return TimedRequest(at_s, prompt, round(longest_output ** chooser.uniform(0.4, 1.0)))

    context = -(-(arguments.longest_input + arguments.longest_output) // 128) * 128
    spec = engine_spec(model_path(arguments), arguments.threads, context, arguments.sequences)
    with Driver(spec, CACHE / "logs" / "poisson.log") as driver:
        full = [request(0.0) for _ in range(2 * arguments.sequences)]
        capacity = len(full) / figures(driver.run(full)).seconds
        rate = arguments.share * capacity
        seconds = 60 * arguments.minutes
        load: list[TimedRequest] = []
        at_s = chooser.expovariate(rate)
        while at_s < seconds or not load:
            load.append(request(at_s))
            at_s += chooser.expovariate(rate)
        begin = driver.memory.now()
        # Raises unless every answer has the number of tokens that was asked for.
        found = figures(driver.run(load, timeout_s=3 * seconds + 120))
        end = driver.memory.now()
        samples = driver.memory.samples
    half = [(at, size) for at, size in samples if (begin + end) / 2 <= at <= end]
    growth = slope(half)
    print_table(
        f"Poisson arrivals for {arguments.minutes:g} minutes at {rate:.2f} requests/s, "
        f"{arguments.share:.0%} of {capacity:.2f}",
        (
            "answered",
            "tokens/s",
            "first token p50 s",
            "p99",
            "between tokens p50 s",
            "p99",
            "peak GiB",
            "growth MiB/min",
        ),
        [
            (
                f"{found.requests} of {len(load)}",
                f"{found.tokens_per_second:.1f}",
                f"{found.first_token_p50_s:.3f}",
                f"{found.first_token_p99_s:.3f}",
                f"{found.token_p50_s:.4f}",
                f"{found.token_p99_s:.4f}",
                f"{max(size for _, size in samples) / 2**30:.2f}",
                f"{growth * 60 / 2**20:+.2f}",
            )
        ],
    )
    write_json(
        json_path(arguments),
        {
            "capacity_requests_per_second": capacity,
            "rate_requests_per_second": rate,
            "sent": len(load),
            "figures": found.to_document(),
            "resident_bytes": samples,
            "growth_bytes_per_second": growth,
        },
    )


if __name__ == "__main__":
    main()
