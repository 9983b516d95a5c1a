"""`bulkhead serve` for real: Ray, broker, two shards, relay; and what an end leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from serving.processes import Process, descendants, read_process, send_signal

START_S = 150.0
DEMO = Path(__file__).parents[2] / "models" / "demo"

pytestmark = pytest.mark.timeout(420)


class Serving:
    """A running `bulkhead serve`."""

    def __init__(self, model: Path, directory: Path) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.endpoint = f"http://127.0.0.1:{port}"
        self.home = directory / "home"
        self.output = directory / "output"
        # Short: Ray puts unix sockets below it.
        self.scratch = Path(tempfile.mkdtemp(prefix="bht-"))
        self.environment = {
            **os.environ,
            "BULKHEAD_HOME": str(self.home),
            "TMPDIR": str(self.scratch),
        }
        with self.output.open("wb") as output:
            self.launcher = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "serving.cli",
                    "serve",
                    "--model",
                    str(model),
                    "--served-name",
                    "tiny",
                    "--port",
                    str(port),
                ],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.members: list[Process] = []

    def wait_until_ready(self) -> None:
        deadline = time.monotonic() + START_S
        while "\nready: " not in self.output.read_text():
            assert self.launcher.poll() is None, self.output.read_text()
            assert time.monotonic() < deadline, self.output.read_text()
            time.sleep(0.2)
        self.members = descendants(self.launcher.pid)

    def command(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "serving.cli", *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def living(self) -> list[str]:
        return [_name(member) for member in self.members if _lives(member)]

    def end(self) -> None:
        self.members += descendants(self.launcher.pid)
        for member in self.members:
            send_signal(member, signal.SIGKILL)
        self.launcher.kill()
        self.launcher.wait()
        shutil.rmtree(self.scratch, ignore_errors=True)


def _lives(process: Process) -> bool:
    now = read_process(process.pid)
    return now is not None and now.started == process.started and now.state != "Z"


def _name(process: Process) -> str:
    return Path(f"/proc/{process.pid}/cmdline").read_text(errors="replace").replace("\0", " ")[:80]


@pytest.fixture
def serving(checkpoint: Callable[[str], Path], tmp_path: Path) -> Iterator[Serving]:
    running = Serving(checkpoint("llama"), tmp_path)
    try:
        running.wait_until_ready()
        yield running
    finally:
        running.end()


def _wait_until_none(serving: Serving, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while left := serving.living():
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def test_it_serves_says_what_is_weak_and_ends_without_a_trace(serving: Serving) -> None:
    answer = httpx.post(
        f"{serving.endpoint}/v1/completions",
        json={"model": "tiny", "prompt": "abc", "max_tokens": 8, "temperature": 0},
        timeout=60,
    )
    assert answer.status_code == 200, answer.text
    assert answer.json()["usage"]["completion_tokens"] >= 1

    shown = serving.output.read_text()
    assert "warning: simulated TEE: protects nothing" in shown
    assert f"curl -s {serving.endpoint}/v1/chat/completions" in shown
    status = serving.command("status")
    assert status.returncode == 0, status.stderr
    assert "stage-1" in status.stdout
    assert "simulated TEE" in status.stdout
    logs = serving.command("logs", "stage-0", "-n", "3")
    assert logs.returncode == 0
    assert len(logs.stdout.splitlines()) == 3
    assert len(serving.members) > 10

    started = time.monotonic()
    serving.launcher.send_signal(signal.SIGINT)
    assert serving.launcher.wait(30) == 130
    assert time.monotonic() - started < 15
    _wait_until_none(serving, 1)
    assert not list(serving.scratch.iterdir())
    ending = serving.output.read_text()[len(shown) :]
    assert ending.strip() == "bulkhead: stopped"
    assert serving.command("status").returncode == 1


def test_killing_the_serving_process_leaves_nothing(serving: Serving) -> None:
    child = next(member for member in serving.members if member.parent == serving.launcher.pid)
    os.kill(child.pid, signal.SIGKILL)
    assert serving.launcher.wait(30) == 1
    _wait_until_none(serving, 1)


def test_killing_the_launcher_leaves_nothing(serving: Serving) -> None:
    serving.launcher.kill()
    serving.launcher.wait(5)
    _wait_until_none(serving, 20)


def test_the_first_answer_of_the_demo_model(tmp_path: Path) -> None:
    """The curl line that is printed works as it stands; so does the official client."""
    running = Serving(DEMO, tmp_path)
    try:
        running.wait_until_ready()
        lines = running.output.read_text().splitlines()
        line = next(line for line in lines if line.strip().startswith("curl "))
        answer = subprocess.run(line, shell=True, capture_output=True, text=True, check=True)
        assert "Paris" in json.loads(answer.stdout)["choices"][0]["message"]["content"]

        client = openai.OpenAI(base_url=f"{running.endpoint}/v1", api_key="none", max_retries=0)
        question = [{"role": "user", "content": "What is the capital of Japan?"}]
        common = {"model": client.models.list().data[0].id, "messages": question, "temperature": 0}
        whole = client.chat.completions.create(**common)
        assert "Tokyo" in whole.choices[0].message.content
        stream = client.chat.completions.create(
            **common, stream=True, stream_options={"include_usage": True}
        )
        events = list(stream)
        text = "".join(e.choices[0].delta.content or "" for e in events if e.choices)
        assert text == whole.choices[0].message.content
        assert events[-1].usage == whole.usage

        # A client that leaves in the middle of a stream frees its place.
        left = client.completions.create(
            model=common["model"],
            prompt="Hello",
            max_tokens=900,
            stream=True,
            extra_body={"ignore_eos": True},
        )
        next(left)
        left.close()
        deadline = time.monotonic() + 15
        while True:
            status = httpx.get(f"{running.endpoint}/bulkhead/status", timeout=20).json()
            head = status["shards"][0]
            if head["running"] == 0 and head["free_blocks"] == head["total_blocks"]:
                break
            assert time.monotonic() < deadline, head
            time.sleep(0.2)
    finally:
        running.end()
