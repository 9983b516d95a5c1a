"""What the benchmarks' command lines have in common."""

from __future__ import annotations

import argparse
import random
from pathlib import Path

from benchmarks.checkpoint import VOCABULARY, cached
from benchmarks.report import RESULTS
from benchmarks.times import TimedRequest, burst

__all__ = ["Workload", "add_workload", "common_parser", "json_path", "model_path", "prompts"]

# The ids below are special ones by custom.
_FIRST_ID = 3


class Workload:
    """A burst of equal requests, of one length in and one out.

    Attributes:
        concurrency: how many at once, one measurement each.
        runs: how often each is measured.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.concurrency: list[int] = arguments.concurrency
        self.input: int = arguments.input
        self.output: int = arguments.output
        self.runs: int = arguments.runs
        self.vocabulary: int = arguments.vocabulary

    @property
    def context(self) -> int:
        """Positions of the longest sequence, rounded up to blocks of any size in use."""
        return -(-(self.input + self.output) // 128) * 128

    @property
    def sequences(self) -> int:
        """Most sequences at once."""
        return max(self.concurrency)

    def burst(self, concurrency: int, run: int) -> list[TimedRequest]:
        """The requests of one run; other prompts in every run, the same for every engine."""
        return burst(
            prompts(concurrency, self.input, self.vocabulary, seed=1000 * run + concurrency),
            self.output,
        )

    def to_document(self) -> dict[str, object]:
        """As JSON values."""
        return {"input_tokens": self.input, "output_tokens": self.output, "runs": self.runs}


def common_parser(name: str, description: str | None) -> argparse.ArgumentParser:
    """A parser with the options of every benchmark."""
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=description,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--model", type=Path, help="checkpoint; made at first use if not given")
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY, help="prompts are below it")
    parser.add_argument("--threads", type=int, default=2, help="processor cores to use")
    parser.add_argument("--json", type=Path, default=RESULTS / f"{name}.json")
    return parser


def add_workload(parser: argparse.ArgumentParser) -> None:
    """Adds the options of a `Workload`."""
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--input", type=int, default=128, help="prompt tokens")
    parser.add_argument("--output", type=int, default=64, help="output tokens")
    parser.add_argument("--runs", type=int, default=3, help="the median is reported")


def model_path(arguments: argparse.Namespace) -> Path:
    """The checkpoint that is measured on."""
    given: Path | None = arguments.model
    return given.resolve() if given is not None else cached()


def json_path(arguments: argparse.Namespace) -> Path:
    """Where results go."""
    path: Path = arguments.json
    return path


def prompts(count: int, length: int, vocabulary: int, seed: int) -> list[tuple[int, ...]]:
    """Random prompts, the same ones for the same arguments."""
    chooser = random.Random(seed)
    return [
        tuple(chooser.randrange(_FIRST_ID, vocabulary) for _ in range(length)) for _ in range(count)
    ]
