"""The arithmetic behind the tables."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.memory import MemoryWatch, slope
from benchmarks.times import RequestTimes, figures, median, percentile


def test_figures_of_two_requests() -> None:
    found = figures(
        [RequestTimes(1.0, (2.0, 2.5, 3.5)), RequestTimes(1.5, (3.5, 4.0))],
    )
    assert found.requests == 2
    assert found.output_tokens == 5
    # From the first submission, at 1.0, to the last token, at 4.0.
    assert found.seconds == 3.0
    assert found.tokens_per_second == pytest.approx(5 / 3)
    assert found.first_token_mean_s == 1.5
    assert (found.first_token_p50_s, found.first_token_max_s) == (1.0, 2.0)
    assert found.token_mean_s == pytest.approx((0.5 + 1.0 + 0.5) / 3)


def test_median_keeps_figures_of_one_run_together() -> None:
    runs = [figures([RequestTimes(0.0, (at, 2 * at))]) for at in (3.0, 1.0, 2.0)]
    assert median(runs) is runs[2]


@given(st.lists(st.floats(-1e6, 1e6), min_size=1), st.floats(0, 100))
def test_percentile_is_the_smallest_that_covers(values: list[float], percent: float) -> None:
    found = percentile(values, percent)
    at_most = sum(value <= found for value in values)
    below = sum(value < found for value in values)
    assert at_most >= percent / 100 * len(values) - 1e-6
    assert below < max(1, percent / 100 * len(values) + 1e-6)


def test_percentile_of_odd_counts_is_the_median() -> None:
    values = [5.0, 1.0, 9.0, 7.0, 3.0]
    assert percentile(values, 50) == statistics.median(values)
    assert percentile(values, 100) == 9.0


@given(st.floats(-1e3, 1e3), st.floats(-1e3, 1e3))
def test_slope_of_a_line(rise: float, start: float) -> None:
    samples = [(float(at), start + rise * at) for at in range(10)]
    assert slope(samples) == pytest.approx(rise, abs=1e-6)  # type: ignore[arg-type]


def test_memory_counts_descendants() -> None:
    hold = "import sys; held = bytearray(b'x') * (96 << 20); print(flush=True); sys.stdin.read()"
    # The grandchild holds the memory.
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
    with subprocess.Popen(
        [sys.executable, "-c", start], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdout.readline()
        watch = MemoryWatch([process.pid])
        while not watch.samples:
            os.sched_yield()
        watch.stop()
        process.stdin.close()
    assert watch.peak_bytes > 96 << 20
