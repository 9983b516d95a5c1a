"""A broker that is killed at random moments under load forgets nothing that it has answered."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from security_samples import Lab, audit_lines

from security import errors
from security.attestation.simulated import SimulatedCollector
from security.broker.audit import verify_home
from security.broker.challenge import Challenge
from security.broker.client import BrokerClient
from security.signing import load_public_key

ROOT = Path(__file__).resolve().parents[2]
INSTANCES = 8
BROKER = (
    "import sys, time; from pathlib import Path; from security.broker.service import start_broker\n"
    "from security.signing import load_public_key\n"
    "home = Path(sys.argv[1])\n"
    "server = start_broker(sys.argv[2], home, load_public_key(home.parent / 'owner.pub'),\n"
    "    witness=home.parent / 'witness')\n"
    "print(server.address, flush=True)\n"
    "time.sleep(600)"
)


def start(home: Path, listen: str) -> tuple[subprocess.Popen[str], str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BROKER, str(home), listen],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


class Load:
    """Shards that ask for admission one after the other, and remember what was answered."""

    def __init__(self, lab: Lab) -> None:
        self._lab = lab
        self.answered: dict[tuple[str, str], X25519PrivateKey] = {}
        self.unsure: set[tuple[str, str]] = set()
        self.used: list[tuple[Challenge, X25519PrivateKey]] = []
        self.count = 0

    def admit(self, client: BrokerClient, challenge: Challenge, key: X25519PrivateKey) -> None:
        public = key.public_key().public_bytes_raw()
        binding = challenge.binding(public, self._lab.manifest.digest)
        client.admit(
            challenge,
            key,
            link_address="127.0.0.1:4000",
            ingress_address="127.0.0.1:5000" if challenge.role == "stage-0" else "",
            evidence=SimulatedCollector("node-a").collect(binding.report_data()),
            observed_manifest_digest=self._lab.manifest.digest,
        )

    def run(self, address: str) -> None:
        """Until the broker is gone."""
        with BrokerClient(address, self._lab.owner_public) as client:
            while True:
                place = (f"pipeline-{self.count % INSTANCES}", f"stage-{self.count % 2}")
                self.count += 1
                key = X25519PrivateKey.generate()
                try:
                    challenge = client.challenge(*place)
                except errors.BrokerUnreachable:
                    return
                self.used.append((challenge, key))
                try:
                    self.admit(client, challenge, key)
                except errors.BrokerUnreachable:
                    # Admitted or not: nobody was told.
                    self.unsure.add(place)
                    return
                self.answered[place] = key
                self.unsure.discard(place)

    def check(self, home: Path) -> None:
        """Between two runs: whoever was told that it is admitted is a member."""
        lab = self._lab
        public = load_public_key(home / "broker.pub")
        verify_home(home, public, home.parent / "witness")
        lab.broker = lab.start()
        admitted = {
            (instance.name, role): member.entry.shard_key
            for instance in lab.broker._instances
            for role, member in instance.members.items()
        }
        lab.close()
        for place, key in self.answered.items():
            if place not in self.unsure:
                assert admitted[place] == key.public_key().public_bytes_raw()

    def replay(self, address: str) -> None:
        """Nonces of the run before, answered or not."""
        with BrokerClient(address, self._lab.owner_public) as client:
            for challenge, key in self.used[-3:]:
                with pytest.raises(errors.AdmissionRefused) as caught:
                    self.admit(client, challenge, key)
                assert caught.value.code == "nonce_unknown"
        self.used.clear()


def kill_often(lab: Lab, times: int, chance: random.Random) -> None:
    lab.install(generation=2, max_instances=INSTANCES)
    lab.close()
    owner = lab.owner.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    (lab.path / "owner.pub").write_bytes(owner)
    load = Load(lab)
    for _ in range(times):
        process, address = start(lab.home, "127.0.0.1:0")
        killer = None
        try:
            assert address, "the database did not open"
            load.replay(address)
            delay = chance.uniform(0.0, 0.3)
            killer = subprocess.Popen(["sh", "-c", f"sleep {delay}; kill -9 {process.pid}"])
            load.run(address)
        finally:
            if process.poll() is None:
                os.kill(process.pid, signal.SIGKILL)
            process.wait()
            if killer is not None:
                killer.wait()
        load.check(lab.home)
    assert load.count > times
    admissions = [line for line in audit_lines(lab.home) if line["event"] == "admitted"]
    assert len(admissions) >= len(load.answered)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lab:
    monkeypatch.setattr("security.broker.client.CALL_TIMEOUT_S", 5.0)
    lab = Lab(tmp_path)
    lab.clock.now = time.time()
    return lab


def test_killed_twenty_times(lab: Lab) -> None:
    kill_often(lab, 20, random.Random(5))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_killed_a_thousand_times(lab: Lab) -> None:
    kill_often(lab, 1000, random.Random(6))
