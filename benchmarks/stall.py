"""What running streams feel of a long prompt that arrives among them.

A first run without the long prompt tells when the streams are well under way and how long they wait
for a token then, each stream its own median. In the second the long prompt arrives at that moment;
until its first token, no stream should wait longer than a small multiple of its usual time.
"""

from __future__ import annotations

import statistics

from benchmarks.checkpoint import CACHE
from benchmarks.driver import Driver
from benchmarks.engine import engine_spec
from benchmarks.options import common_parser, json_path, model_path, prompts
from benchmarks.report import print_table, write_json
from benchmarks.times import RequestTimes, TimedRequest, burst

__all__ = ["main"]

# A stream has got this many tokens when the long prompt arrives.
_UNDER_WAY = 16


def main() -> None:
    """Measures and reports."""
    parser = common_parser("stall", __doc__)
    parser.add_argument("--streams", type=int, default=8)
    parser.add_argument("--input", type=int, default=128, help="prompt tokens of a stream")
    parser.add_argument("--output", type=int, default=160, help="output tokens of a stream")
    parser.add_argument("--long", type=int, default=2000, help="tokens of the long prompt")
    parser.add_argument("--long-output", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3, help="the median is reported")
    arguments = parser.parse_args()
    if arguments.output <= _UNDER_WAY:
        parser.error(f"--output: expected more than {_UNDER_WAY}, found {arguments.output}")
    longest = max(arguments.input + arguments.output, arguments.long + arguments.long_output)
    spec = engine_spec(
        model_path(arguments), arguments.threads, -(-longest // 128) * 128, arguments.streams + 1
    )
    results: list[dict[str, float]] = []
    with Driver(spec, CACHE / "logs" / "stall.log") as driver:
        driver.run([TimedRequest(0.0, _long(arguments.long, arguments.vocabulary, 0), 2)])
        for run in range(arguments.runs):
            streams = burst(
                prompts(arguments.streams, arguments.input, arguments.vocabulary, seed=run),
                arguments.output,
            )
            undisturbed = driver.run(streams)
            at_s = max(stream.tokens_s[_UNDER_WAY - 1] for stream in undisturbed)
            long = TimedRequest(
                at_s,
                _long(arguments.long, arguments.vocabulary, run + 1),
                arguments.long_output,
            )
            *disturbed, newcomer = driver.run([*streams, long])
            results.append(_compare(undisturbed, disturbed, newcomer))
    middle = sorted(results, key=lambda result: result["worst_ratio"])[(len(results) - 1) // 2]
    print_table(
        f"A prompt of {arguments.long} tokens among {arguments.streams} streams, median of "
        f"{arguments.runs}",
        ("usual interval ms", "longest ms", "worst stream's ratio", "long prompt's first token s"),
        [
            (
                f"{middle['usual_s'] * 1e3:.0f}",
                f"{middle['longest_s'] * 1e3:.0f}",
                f"{middle['worst_ratio']:.2f}x",
                f"{middle['long_first_token_s']:.2f}",
            )
        ],
    )
    write_json(json_path(arguments), {"median": middle, "runs": results})


def _long(length: int, vocabulary: int, run: int) -> tuple[int, ...]:
    (prompt,) = prompts(1, length, vocabulary, seed=10_000 + run)
    return prompt


def _compare(
    undisturbed: list[RequestTimes], disturbed: list[RequestTimes], newcomer: RequestTimes
) -> dict[str, float]:
    """How much longer each stream waits for a token while the long prompt is computed."""
    begin, end = newcomer.submitted_s, newcomer.tokens_s[0]
    usual = [statistics.median(stream.intervals_s[_UNDER_WAY:]) for stream in undisturbed]
    # An interval counts if any of it lies between the prompt's arrival and its first token. A
    # stream that was about to end may have none.
    longest = [
        max(
            (
                after - before
                for before, after in zip(stream.tokens_s, stream.tokens_s[1:], strict=False)
                if after > begin and before < end
            ),
            default=0.0,
        )
        for stream in disturbed
    ]
    return {
        "usual_s": statistics.median(usual),
        "longest_s": max(longest),
        "worst_ratio": max(a / b for a, b in zip(longest, usual, strict=True)),
        "long_first_token_s": newcomer.first_token_s,
    }


if __name__ == "__main__":
    main()
