"""The engine alone: one stage with all layers, no broker, no links, no HTTP.

Each concurrency is measured in a fresh process: a warm-up, then runs of which the median counts.
"""

from __future__ import annotations

import sys
from pathlib import Path

from benchmarks.checkpoint import CACHE
from benchmarks.driver import Driver, DriverSpec
from benchmarks.options import Workload, add_workload, common_parser, json_path, model_path
from benchmarks.report import FIGURE_COLUMNS, figure_cells, print_table, write_json
from benchmarks.times import figures, median
from placement.plan import WEIGHT_FORMATS

__all__ = ["engine_spec", "main"]


def engine_spec(
    model: Path, threads: int, context: int, sequences: int, weights: str = "plain"
) -> DriverSpec:
    """How Bulkhead's engine is started for every benchmark of it."""
    return DriverSpec(
        name="bulkhead",
        python=Path(sys.executable),
        module="benchmarks.drivers.engine_driver",
        model=model,
        threads=threads,
        context=context,
        sequences=sequences,
        environment={"HF_HUB_OFFLINE": "1"},
        weights=weights,
    )


def main() -> None:
    """Measures and reports."""
    parser = common_parser("engine", __doc__)
    add_workload(parser)
    parser.add_argument(
        "--weights", choices=WEIGHT_FORMATS, default="plain", help="format of linears and head"
    )
    arguments = parser.parse_args()
    workload = Workload(arguments)
    model = model_path(arguments)
    weights: str = arguments.weights
    spec = engine_spec(model, arguments.threads, workload.context, workload.sequences, weights)
    rows: list[tuple[str, ...]] = []
    results: list[dict[str, object]] = []
    for concurrency in workload.concurrency:
        with Driver(spec, CACHE / "logs" / "engine.log") as driver:
            driver.run(workload.burst(concurrency, run=0))
            runs = [
                figures(driver.run(workload.burst(concurrency, run + 1)))
                for run in range(workload.runs)
            ]
            middle = median(runs)
            peak = driver.memory.peak_bytes
            results.append(
                {
                    "concurrency": concurrency,
                    "ready_s": driver.ready_s,
                    "peak_rss_bytes": peak,
                    "median": middle.to_document(),
                    "runs": [run.to_document() for run in runs],
                }
            )
        rows.append(
            (
                str(concurrency),
                *figure_cells(middle),
                f"{driver.ready_s:.1f}",
                f"{peak / 2**30:.2f}",
            )
        )
    print_table(
        f"Engine alone, {weights} weights, {workload.input} tokens in, {workload.output} out, "
        f"{arguments.threads} threads, median of {workload.runs}",
        ("requests", *FIGURE_COLUMNS, "ready s", "peak GiB"),
        rows,
    )
    write_json(
        json_path(arguments), {"weights": weights, **workload.to_document(), "results": results}
    )


if __name__ == "__main__":
    main()
