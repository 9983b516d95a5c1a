"""`bulkhead broker` and `bulkhead deploy` from outside a cluster of three hosts."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from checkpoints import Oracle

from .hosts import Hosts, HostsUnavailable
from .ray_cluster import RayCluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(900)]

DEMO = Path(__file__).resolve().parents[2] / "models" / "demo"
LABELS = ["bulkhead.tee=simulated,bulkhead.region=eu-west"] * 3
PORT = 8000
TOKENS = 800
CUT_S = 12.0


class Deployment:
    """A broker outside the cluster, and the demo model on all three hosts of it."""

    def __init__(self, cluster: RayCluster, home: Path) -> None:
        self.cluster = cluster
        self.home = home
        self.endpoint = f"http://{cluster.hosts.addresses[0]}:{PORT}"
        self.ray_address = f"ray://{cluster.hosts.addresses[0]}:10001"
        self._broker: subprocess.Popen[str] | None = None
        self.broker_address = ""

    def bulkhead(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "serving.cli", *arguments, "--home", str(self.home)],
            env=self.cluster.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )
        print(done.stdout, done.stderr)
        return done

    def start_broker(self) -> None:
        self._broker = subprocess.Popen(
            [
                *(sys.executable, "-u", "-m", "serving.cli", "broker"),
                *("--listen", f"{self.cluster.hosts.gateway}:0", "--home", str(self.home)),
            ],
            env=self.cluster.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=(self.home.parent / "broker.log").open("w"),
            text=True,
        )
        assert self._broker.stdout is not None
        said = self._broker.stdout.readline()
        assert said.startswith("key broker at "), said
        self.broker_address = said.split()[3].rstrip(";")

    def stop_broker(self) -> None:
        if self._broker is not None:
            self._broker.send_signal(signal.SIGTERM)
            self._broker.wait(15)

    def deploy(self) -> subprocess.CompletedProcess[str]:
        return self.bulkhead(
            "deploy",
            *("--address", self.ray_address),
            *("--broker", self.broker_address, "--broker-key", str(self.home / "broker.pub")),
            *("--model", str(DEMO), "--node-model", "~/models/demo"),
            *("--host", self.cluster.hosts.addresses[0], "--port", str(PORT), "--stages", "3"),
        )

    def status(self) -> dict[str, object]:
        return dict(httpx.get(f"{self.endpoint}/bulkhead/status", timeout=20).json())


@pytest.fixture(scope="module")
def deployment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    try:
        hosts = Hosts(3)
    except HostsUnavailable as error:
        pytest.skip(str(error))
    home = tmp_path_factory.mktemp("owner") / "home"
    with hosts:
        cluster = RayCluster(hosts, LABELS)
        cluster.up()
        made = Deployment(cluster, home)
        made.start_broker()
        try:
            yield made
        finally:
            made.stop_broker()
    assert hosts.leftovers() == []


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(DEMO)


def continuation(oracle: Oracle, prompt: str) -> str:
    """What greedy `generate` makes of a prompt, past every end-of-sequence token."""
    ids = oracle.tokenizer(prompt, add_special_tokens=True)["input_ids"]
    output = oracle.greedy(ids, TOKENS, ignore_end=True)
    return str(oracle.tokenizer.decode(output, skip_special_tokens=True))


def client(deployment: Deployment) -> openai.OpenAI:
    return openai.OpenAI(
        base_url=f"{deployment.endpoint}/v1", api_key="unused", max_retries=0, timeout=200
    )


def test_deploy_puts_a_shard_on_each_host(deployment: Deployment) -> None:
    done = deployment.deploy()
    assert done.returncode == 0, done.stderr
    assert "simulated TEE: protects nothing" in done.stdout + done.stderr
    shards = deployment.status()["shards"]
    assert sorted(shard["node"] for shard in shards) == ["host-1", "host-2", "host-3"]
    assert {shard["state"] for shard in shards} == {"serving"}
    answer = client(deployment).chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": "What is the capital of France?"}],
        temperature=0,
    )
    assert "Paris" in (answer.choices[0].message.content or "")
    logs = deployment.bulkhead("logs", "stage-2", "-n", "50")
    assert "serving" in logs.stdout


def test_streams_what_generate_makes(deployment: Deployment, oracle: Oracle) -> None:
    prompt = "The capital of Italy is"
    stream = client(deployment).completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = "".join(chunk.choices[0].text for chunk in stream)
    assert text == continuation(oracle, prompt)


@pytest.mark.parametrize("host", [1, 2, 0])
def test_host_cut_off_mid_stream_and_joined_again(
    deployment: Deployment, oracle: Oracle, host: int
) -> None:
    hosts = deployment.cluster.hosts
    prompt = "Hello, who are you?"
    stream = client(deployment).completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        stream=True,
        extra_body={"ignore_eos": True},
    )
    text = next(stream).choices[0].text
    hosts.cut(host)
    joining = threading.Timer(CUT_S, hosts.join, [host])
    joining.start()
    try:
        began = time.monotonic()
        for chunk in stream:
            text += chunk.choices[0].text
        lasted = time.monotonic() - began
    except openai.APIError:
        joining.join()
        for host_number in range(3):
            logs = deployment.cluster.hosts.run(
                host_number, "tail -n 60 ~/.bulkhead/logs/*/*.log", check=False
            )
            print(logs.stdout)
        raise
    finally:
        joining.join()
    assert text == continuation(oracle, prompt)
    assert lasted > CUT_S * 0.9, "the stream did not need the host that was cut off"


def test_deployed_again_and_taken_down(deployment: Deployment, oracle: Oracle) -> None:
    """Deploying replaces what runs; taking down leaves Ray, and no shard."""
    before = {shard["pid"] for shard in deployment.status()["shards"]}
    done = deployment.deploy()
    assert done.returncode == 0, done.stderr
    assert not before & {shard["pid"] for shard in deployment.status()["shards"]}
    prompt = "The capital of Spain is"
    answer = client(deployment).completions.create(
        model="demo",
        prompt=prompt,
        max_tokens=TOKENS,
        temperature=0,
        extra_body={"ignore_eos": True},
    )
    assert answer.choices[0].text == continuation(oracle, prompt)
    down = deployment.bulkhead("deploy", "--down", "--address", deployment.ray_address)
    assert down.returncode == 0, down.stderr
    for host in range(3):
        found = deployment.cluster.hosts.run(
            host, "pgrep -f '[r]untime.shard.process'", check=False
        )
        assert not found.stdout, found.stdout


def test_ray_down_leaves_nothing(deployment: Deployment) -> None:
    deployment.cluster.down()
    assert deployment.cluster.hosts.wait_until_clean(120) == []
