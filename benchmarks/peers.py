"""Bulkhead's engine beside vLLM's CPU build and transformers `generate`, in one go.

Every engine is a process of its own that stays up while the others run, and sleeps meanwhile. They
take turns: for each concurrency a warm-up, then rounds in which each runs the same prompts. Ratios
are medians of the rounds' own ratios. A peer that cannot be installed or fails is named, and the
exit code is 1.
"""

from __future__ import annotations

import contextlib
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

from benchmarks.checkpoint import CACHE
from benchmarks.driver import Driver, DriverEnded, DriverSpec
from benchmarks.engine import engine_spec
from benchmarks.options import Workload, add_workload, common_parser, json_path, model_path
from benchmarks.peer_environments import PeerMissing, vllm_environment, vllm_python
from benchmarks.report import FIGURE_COLUMNS, figure_cells, print_table, write_json
from benchmarks.times import Figures, figures, median

__all__ = ["main"]

OURS = "bulkhead"


class Comparison:
    """Engines side by side.

    Attributes:
        runs: by engine and concurrency, one of each round.
        ready_s: by engine, one of each start.
        peak_bytes: by engine, resident memory of all its processes.
        missing: by engine, why it has not been measured to the end.
    """

    def __init__(self, specs: list[DriverSpec], missing: dict[str, str]) -> None:
        self.runs: defaultdict[tuple[str, int], list[Figures]] = defaultdict(list)
        self.ready_s: defaultdict[str, list[float]] = defaultdict(list)
        self.peak_bytes: dict[str, int] = {}
        self.missing = missing
        self._specs = specs

    def measure(self, workload: Workload, starts: int) -> None:
        """Starts every engine `starts` times, keeps the last, and runs the workload on all."""
        with contextlib.ExitStack() as stack:
            drivers: list[Driver] = []
            for start in range(starts):
                for spec in self._specs:
                    with self._noting(spec.name):
                        driver = self._start(spec)
                        if start < starts - 1:
                            driver.close()
                        else:
                            drivers.append(stack.enter_context(driver))
            for concurrency in workload.concurrency:
                for run in range(workload.runs + 1):
                    for driver in drivers:
                        if driver.name not in self.missing:
                            with self._noting(driver.name):
                                self._run(driver, workload, concurrency, run)
            for driver in drivers:
                self.peak_bytes[driver.name] = driver.memory.peak_bytes

    def ratio(self, value: Callable[[Figures], float], peer: str, concurrency: int) -> float | None:
        """Ours over a peer's; None where one of them is missing."""
        ours, theirs = self.runs[OURS, concurrency], self.runs[peer, concurrency]
        if OURS in self.missing or peer in self.missing or not theirs:
            return None
        return statistics.median(value(a) / value(b) for a, b in zip(ours, theirs, strict=True))

    @contextlib.contextmanager
    def _noting(self, name: str) -> Iterator[None]:
        """Notes an engine that fails as missing; the others go on."""
        try:
            yield
        except DriverEnded as error:
            self.missing[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr, flush=True)

    def _start(self, spec: DriverSpec) -> Driver:
        driver = Driver(spec, CACHE / "logs" / f"{spec.name}.log")
        print(f"{spec.name}: ready after {driver.ready_s:.1f} s", flush=True)
        self.ready_s[spec.name].append(driver.ready_s)
        return driver

    def _run(self, driver: Driver, workload: Workload, concurrency: int, run: int) -> None:
        found = figures(driver.run(workload.burst(concurrency, run)))
        if run == 0:  # the warm-up
            return
        self.runs[driver.name, concurrency].append(found)
        print(
            f"{driver.name}: {concurrency} requests: {found.tokens_per_second:.1f} tokens/s, first "
            f"after {found.first_token_mean_s:.3f} s",
            flush=True,
        )


def main() -> None:
    """Installs what is missing, measures and reports."""
    parser = common_parser("peers", __doc__)
    add_workload(parser)
    parser.add_argument("--starts", type=int, default=3, help="of each engine; the median counts")
    parser.add_argument("--peers", nargs="+", default=["vllm", "transformers"])
    arguments = parser.parse_args()
    workload = Workload(arguments)
    model = model_path(arguments)
    missing: dict[str, str] = {}
    specs = [engine_spec(model, arguments.threads, workload.context, workload.sequences)]
    for peer in arguments.peers:
        try:
            specs.append(_peer_spec(peer, model, arguments.threads, workload))
        except PeerMissing as error:
            missing[peer] = str(error)
    comparison = Comparison(specs, missing)
    comparison.measure(workload, arguments.starts)
    names = [spec.name for spec in specs]
    _print(comparison, names, workload, arguments.threads)
    ratios = [
        {
            "peer": peer,
            "concurrency": concurrency,
            "tokens_per_second": comparison.ratio(_speed, peer, concurrency),
            "first_token_mean": comparison.ratio(_first, peer, concurrency),
        }
        for peer in arguments.peers
        for concurrency in workload.concurrency
    ]
    results = [
        {
            "engine": name,
            "concurrency": concurrency,
            "median": median(runs).to_document(),
            "runs": [run.to_document() for run in runs],
        }
        for (name, concurrency), runs in comparison.runs.items()
        if runs
    ]
    write_json(
        json_path(arguments),
        {
            **workload.to_document(),
            "results": results,
            "ready_s": comparison.ready_s,
            "peak_rss_bytes": comparison.peak_bytes,
            "ratios": ratios,
            "missing": comparison.missing,
        },
    )
    for name, reason in comparison.missing.items():
        print(f"\nNOT MEASURED: {name}: {reason}", file=sys.stderr)
    sys.exit(1 if comparison.missing else 0)


def _peer_spec(peer: str, model: Path, threads: int, workload: Workload) -> DriverSpec:
    if peer == "vllm":
        python, environment = vllm_python(), vllm_environment(threads)
    elif peer == "transformers":
        # Our own pinned version is what our users would otherwise run.
        python, environment = Path(sys.executable), {"HF_HUB_OFFLINE": "1"}
    else:
        raise PeerMissing(f"peer: expected vllm or transformers, found {peer!r}")
    return DriverSpec(
        name=peer,
        python=python,
        module=f"benchmarks.drivers.{peer}_driver",
        model=model,
        threads=threads,
        context=workload.context,
        sequences=workload.sequences,
        environment=environment,
    )


def _print(comparison: Comparison, names: list[str], workload: Workload, threads: int) -> None:
    print_table(
        f"Engines side by side, {workload.input} tokens in, {workload.output} out, {threads} "
        f"cores, median of {workload.runs}",
        ("", *FIGURE_COLUMNS),
        [
            (f"{name}, {concurrency} requests", *figure_cells(median(runs)))
            for concurrency in workload.concurrency
            for name in names
            if (runs := comparison.runs[name, concurrency])
        ],
    )
    print_table(
        "From the start of the process to the first answer",
        ("", "ready s", "first start s", "peak GiB"),
        [
            (
                name,
                f"{statistics.median(comparison.ready_s[name]):.1f}",
                f"{comparison.ready_s[name][0]:.1f}",
                f"{comparison.peak_bytes.get(name, 0) / 2**30:.2f}",
            )
            for name in names
            if comparison.ready_s[name]
        ],
    )
    print_table(
        "Bulkhead over its peers (speed: more is better; first token: less is better)",
        ("", "speed", "first token"),
        [
            (
                f"{peer}, {concurrency} requests",
                _shown(comparison.ratio(_speed, peer, concurrency)),
                _shown(comparison.ratio(_first, peer, concurrency)),
            )
            for peer in names
            if peer != OURS
            for concurrency in workload.concurrency
        ],
    )


def _speed(run: Figures) -> float:
    return run.tokens_per_second


def _first(run: Figures) -> float:
    return run.first_token_mean_s


def _shown(ratio: float | None) -> str:
    return "missing" if ratio is None else f"{ratio:.2f}x"


if __name__ == "__main__":
    main()
