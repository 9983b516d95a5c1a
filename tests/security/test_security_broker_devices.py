"""Admission over the network with the evidence of GPUs, as a shard asks for it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import nvidia_machine
import pytest
from hardware_lab import collector, policy_text, write_collateral
from nvml_stand_in import NvmlStandIn
from security_samples import Lab
from snp_machine import NOW, SnpMachine

from security.attestation import collect, nvml
from security.broker import candidate, key_broker, service
from security.broker.candidate import request_admission
from security.broker.service import BrokerServer
from security.errors import AdmissionRefused, SecurityError

MACHINE = SnpMachine(product="Genoa")
GPUS = nvidia_machine.machine(2, 0).devices
REAL = nvml.collect_gpus


@contextmanager
def broker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Lab, BrokerServer]]:
    """A broker at the time at which the machines that do not exist are valid."""
    at = partial(key_broker.KeyBroker, clock=lambda: float(NOW))
    monkeypatch.setattr(service, "KeyBroker", at)
    lab = Lab(tmp_path, policy_text(MACHINE, GPUS))
    known = MACHINE.collateral().with_more(nvidia_machine.collateral())
    directory = write_collateral(tmp_path / "collateral", known)
    server = service.start_broker("127.0.0.1:0", tmp_path / "home", lab.owner_public, directory)
    try:
        server.install(lab.installation(server.public_key))
        yield lab, server
    finally:
        server.stop(0)


def ask(
    lab: Lab,
    server: BrokerServer,
    monkeypatch: pytest.MonkeyPatch,
    gpus: Callable[[bytes], dict[str, bytes]],
) -> None:
    monkeypatch.setattr(collect.nvml, "collect_gpus", gpus)
    monkeypatch.setattr(candidate, "choose_collector", lambda *_: collector(MACHINE))
    _, membership, _ = request_admission(
        server.address,
        lab.owner_public,
        instance="pipeline-0",
        role="stage-1",
        node="node-a",
        model_dir=lab.model,
        link_address="127.0.0.1:4000",
    )
    membership.close()


def test_admitted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with broker(tmp_path, monkeypatch) as (lab, server):
        ask(lab, server, monkeypatch, lambda nonce: REAL(nonce, NvmlStandIn(GPUS)))


def test_wrong_nonce(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with broker(tmp_path, monkeypatch) as (lab, server):
        with pytest.raises(AdmissionRefused) as refused:
            ask(lab, server, monkeypatch, lambda nonce: REAL(b"n" * 32, NvmlStandIn(GPUS)))
        assert refused.value.code == "nvidia_nonce_mismatch"


def test_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shard finds out by itself that it cannot show what the policy demands."""
    with broker(tmp_path, monkeypatch) as (lab, server):
        with pytest.raises(SecurityError) as refused:
            ask(lab, server, monkeypatch, lambda nonce: REAL(nonce, NvmlStandIn(())))
        assert refused.value.code == "nvml_unavailable"
