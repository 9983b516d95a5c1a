"""The whole plan without Ray, on the same cores: one stage, two stages, two without encryption.

Requests are sealed and streamed, as a client's are. The variants run one after another, each in
fresh processes, and the round is repeated; the median run of each counts, and ratios are medians of
the rounds' own ratios, so that a slow minute hits both sides.
"""

from __future__ import annotations

import asyncio
import os
import statistics
from collections import defaultdict
from pathlib import Path

from benchmarks.options import Workload, add_workload, common_parser, json_path, model_path
from benchmarks.planned import Size
from benchmarks.report import FIGURE_COLUMNS, figure_cells, print_table, write_json
from benchmarks.served_plan import ServedPlan, Variant
from benchmarks.times import Figures, figures, median

__all__ = ["main"]

WHOLE, SPLIT, PLAIN = "1 stage", "2 stages, encrypted", "2 stages, plain links"


class Found:
    """What was measured.

    Attributes:
        runs: by variant and concurrency, one of each round.
        ready_s: by variant, one of each round.
        peak_bytes: by variant, resident memory of all its shards.
    """

    def __init__(self) -> None:
        self.runs: defaultdict[tuple[str, int], list[Figures]] = defaultdict(list)
        self.ready_s: defaultdict[str, list[float]] = defaultdict(list)
        self.peak_bytes: defaultdict[str, int] = defaultdict(int)

    async def measure(
        self, model: Path, size: Size, variant: Variant, workload: Workload, run: int
    ) -> None:
        """Adds one run of every concurrency."""
        name = variant.name
        with ServedPlan(model, size, variant) as plan:
            self.ready_s[name].append(plan.ready_s)
            for concurrency in workload.concurrency:
                await plan.run(workload.burst(concurrency, run=0))
                times = await plan.run(workload.burst(concurrency, run + 1))
                self.runs[name, concurrency].append(figures(times))
            self.peak_bytes[name] = max(self.peak_bytes[name], plan.memory.peak_bytes)

    def ratio(self, above: str, below: str, concurrency: int) -> float:
        """Of two variants' tokens a second: the median of the rounds' own ratios."""
        pairs = zip(self.runs[above, concurrency], self.runs[below, concurrency], strict=True)
        return statistics.median(a.tokens_per_second / b.tokens_per_second for a, b in pairs)


def main() -> None:
    """Measures and reports."""
    parser = common_parser("plan", __doc__)
    add_workload(parser)
    parser.add_argument("--split", type=int, default=14, help="first layer of the second stage")
    parser.add_argument("--dtype", default="bfloat16")
    arguments = parser.parse_args()
    workload = Workload(arguments)
    model = model_path(arguments)
    size = Size(workload.context, workload.sequences, arguments.dtype)
    found = Found()
    variants = _variants(arguments.threads, arguments.split)
    for run in range(workload.runs):
        for variant in variants:
            asyncio.run(found.measure(model, size, variant, workload, run))
    rows = [
        (
            f"{variant.name}, {concurrency} requests",
            *figure_cells(median(found.runs[variant.name, concurrency])),
            f"{statistics.median(found.ready_s[variant.name]):.1f}",
            f"{found.peak_bytes[variant.name] / 2**30:.2f}",
        )
        for concurrency in workload.concurrency
        for variant in variants
    ]
    print_table(
        f"Whole plan without Ray, {workload.input} tokens in, {workload.output} out, "
        f"{arguments.threads} cores in all, median of {workload.runs}",
        ("", *FIGURE_COLUMNS, "ready s", "peak GiB"),
        rows,
    )
    ratios = [
        {
            "concurrency": concurrency,
            "split_over_whole": found.ratio(SPLIT, WHOLE, concurrency),
            "encrypted_over_plain": found.ratio(SPLIT, PLAIN, concurrency),
        }
        for concurrency in workload.concurrency
    ]
    print_table(
        "Ratios of tokens a second, median of the rounds",
        ("requests", "2 stages / 1 stage", "encrypted / plain links"),
        [
            (
                str(ratio["concurrency"]),
                f"{ratio['split_over_whole']:.3f}",
                f"{ratio['encrypted_over_plain']:.3f}",
            )
            for ratio in ratios
        ],
    )
    results = [
        {
            "variant": name,
            "concurrency": concurrency,
            "ready_s": found.ready_s[name],
            "peak_rss_bytes": found.peak_bytes[name],
            "median": median(runs).to_document(),
            "runs": [run.to_document() for run in runs],
        }
        for (name, concurrency), runs in found.runs.items()
    ]
    write_json(
        json_path(arguments), {**workload.to_document(), "results": results, "ratios": ratios}
    )


def _variants(cores: int, split: int) -> list[Variant]:
    usable = sorted(os.sched_getaffinity(0))[:cores]
    half = max(1, len(usable) // 2)
    halves = (tuple(usable[:half]), tuple(usable[half:] or usable[:half]))
    return [
        Variant(WHOLE, (), (tuple(usable),)),
        Variant(SPLIT, (split,), halves),
        Variant(PLAIN, (split,), halves, encrypted=False),
    ]


if __name__ == "__main__":
    main()
