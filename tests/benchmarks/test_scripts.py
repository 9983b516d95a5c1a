"""Each benchmark runs for a moment on a tiny checkpoint, so that none of them rots."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks.checkpoint import ROOT, write
from benchmarks.driver import Driver, DriverEnded
from benchmarks.engine import engine_spec
from benchmarks.times import burst

VOCABULARY = 256
TIMEOUT_S = 240


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("tiny"),
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )


def run(name: str, json_path: Path, *arguments: object, code: int = 0) -> tuple[dict, str]:
    done = subprocess.run(
        [
            *(sys.executable, "-m", f"benchmarks.{name}", "--json", str(json_path)),
            *map(str, arguments),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(json_path.read_text()), done.stdout + done.stderr


def small(model: Path) -> tuple[object, ...]:
    return (
        *("--model", model, "--vocabulary", VOCABULARY, "--threads", 1),
        *("--input", 12, "--output", 5, "--runs", 1),
    )


def check(figures: dict, requests: int, tokens: int) -> None:
    assert figures["requests"] == requests
    assert figures["output_tokens"] == requests * tokens
    expected = figures["output_tokens"] / figures["seconds"]
    assert figures["tokens_per_second"] == pytest.approx(expected)
    assert 0 < figures["first_token_p50_s"] <= figures["first_token_max_s"] < figures["seconds"]
    assert 0 < figures["token_mean_s"] < figures["seconds"]


def test_engine(model: Path, tmp_path: Path) -> None:
    found, said = run("engine", tmp_path / "found.json", *small(model), "--concurrency", 3)
    (result,) = found["results"]
    check(result["median"], 3, 5)
    assert result["ready_s"] > 0
    assert result["peak_rss_bytes"] > 50 << 20
    assert found["machine"]["processor"]
    assert "tokens/s" in said


def test_plan(model: Path, tmp_path: Path) -> None:
    found, _ = run("plan", tmp_path / "found.json", *small(model), "--concurrency", 2, "--split", 1)
    for result in found["results"]:
        check(result["median"], 2, 5)
    assert [result["variant"] for result in found["results"]] == [
        "1 stage",
        "2 stages, encrypted",
        "2 stages, plain links",
    ]
    (ratio,) = found["ratios"]
    speeds = [result["median"]["tokens_per_second"] for result in found["results"]]
    assert ratio["split_over_whole"] == pytest.approx(speeds[1] / speeds[0])
    assert ratio["encrypted_over_plain"] == pytest.approx(speeds[1] / speeds[2])


def test_links(tmp_path: Path) -> None:
    found, _ = run(
        "links", tmp_path / "found.json", "--sizes", 100, 200_000, "--seconds", 0.05, "--rounds", 1
    )
    for result in found["results"]:
        assert result["link_s"] > 0
        assert result["plain_bytes_per_second"] == result["bytes"] / result["plain_s"]


def test_stall(model: Path, tmp_path: Path) -> None:
    found, _ = run(
        "stall",
        tmp_path / "found.json",
        *("--model", model, "--vocabulary", VOCABULARY, "--threads", 1),
        *("--streams", 2, "--input", 8, "--output", 60, "--long", 700, "--runs", 1),
    )
    assert found["median"]["worst_ratio"] > 0
    assert found["median"]["long_first_token_s"] > 0


def test_poisson(model: Path, tmp_path: Path) -> None:
    found, said = run(
        "poisson",
        tmp_path / "found.json",
        *("--model", model, "--vocabulary", VOCABULARY, "--threads", 1),
        *("--minutes", 0.03, "--sequences", 4, "--longest-input", 24, "--longest-output", 8),
    )
    assert found["figures"]["requests"] == found["sent"] > 0
    assert f"{found['sent']} of {found['sent']}" in said


def test_peers_says_which_is_missing(model: Path, tmp_path: Path) -> None:
    found, said = run(
        "peers",
        tmp_path / "found.json",
        *small(model),
        *("--concurrency", 2, "--starts", 1, "--peers", "transformers", "nobody"),
        code=1,
    )
    for result in found["results"]:
        check(result["median"], 2, 5)
    assert {result["engine"] for result in found["results"]} == {"bulkhead", "transformers"}
    assert "NOT MEASURED: nobody" in said
    ratios = {ratio["peer"]: ratio["tokens_per_second"] for ratio in found["ratios"]}
    ours, theirs = (result["median"]["tokens_per_second"] for result in found["results"])
    assert ratios["transformers"] == pytest.approx(ours / theirs)
    assert ratios["nobody"] is None


def test_driver_that_dies_is_named_and_leaves_nothing(model: Path, tmp_path: Path) -> None:
    spec = engine_spec(model, threads=1, context=64, sequences=2)
    with Driver(spec, tmp_path / "driver.log") as driver:
        pid = driver._process.pid
        os.kill(pid, signal.SIGKILL)
        begin = time.monotonic()
        with pytest.raises(DriverEnded, match="bulkhead ended"):
            driver.run(burst([(5, 6, 7)], 2))
        assert time.monotonic() - begin < 5
    with pytest.raises(ProcessLookupError):
        os.killpg(pid, 0)


def test_driver_ends_in_the_middle_of_a_load_when_its_starter_dies(
    model: Path, tmp_path: Path
) -> None:
    starter = """
import sys
from pathlib import Path
from benchmarks.driver import Driver
from benchmarks.engine import engine_spec
from benchmarks.times import TimedRequest
with Driver(engine_spec(Path(sys.argv[1]), 1, 64, 2), Path(sys.argv[2])) as driver:
    print(driver._process.pid, flush=True)
    driver.run([TimedRequest(600.0, (5, 6, 7), 2)])
"""
    with subprocess.Popen(
        [sys.executable, "-c", starter, str(model), str(tmp_path / "driver.log")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.1)
    os.killpg(pid, signal.SIGKILL)
    raise AssertionError("the driver goes on")


def test_gpu_on_a_cpu(tmp_path: Path) -> None:
    found, said = run(
        "gpu",
        tmp_path / "found.json",
        *("--device", "cpu", "--tiny", "--runs", 1, "--concurrency", 1, 3),
        *("--input", 12, "--output", 5, "--prefill", 40),
    )
    assert found["device"] == "CPU"
    assert found["backend"] == "cpu graphs, attention gathered"
    assert found["bandwidth_bytes_per_second"]["read"] > 0
    for result, batch in zip(found["results"], (1, 3), strict=True):
        check(result["median"], batch, 5)
        expected = result["read_bytes"] / result["median"]["token_mean_s"]
        share = expected / found["bandwidth_bytes_per_second"]["read"]
        assert result["share_of_bandwidth"] == pytest.approx(share)
    # Two layers, norm and head; and per position a key and a value of two heads in each layer.
    layer = 64 * (64 + 32 + 32 + 64) + 3 * 64 * 96 + 2 * 64
    weights = 2 * (2 * layer + 64 + 256 * 64)
    assert found["results"][0]["read_bytes"] == weights + 14 * 2 * 2 * 2 * 16 * 2
    theirs = found["transformers"]["tokens_per_second"]
    ours = found["results"][1]["median"]["tokens_per_second"]
    assert found["ratio_to_transformers"] == pytest.approx(ours / theirs)
    assert "device: CPU" in said


def test_sealing_reads_both(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    from benchmarks import sealing

    monkeypatch.setattr(sys, "argv", ["sealing", "--megabytes", "4", "--rounds", "1"])
    sealing.main()
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "seal",
        "plain",
        "sealed",
        "ratio",
    ]
