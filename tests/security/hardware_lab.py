"""Machines with a CPU that attests, with and without GPUs, and policies that pin them exactly."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import nvidia_machine
from nvidia_machine import Device
from security_samples import Clock, Lab
from snp_machine import NOW, SnpMachine
from tsm_stand_in import MemoryFiles, TsmKernel

from placement.requirements import Requirements
from security.attestation.collateral import Collateral
from security.attestation.collateral_directory import CollateralDirectory
from security.attestation.tsm import TsmCollector
from security.broker.key_broker import KeyBroker
from security.broker.store import BrokerStore

REPORTS = Path("/sys/kernel/config/tsm/report")


def snp_kernel(machine: SnpMachine) -> TsmKernel:
    """A kernel whose security processor signs as this machine."""

    def sign(report_data: bytes, level: int) -> tuple[bytes, bytes]:
        parts = replace(machine, report_data=report_data, vmpl=level).parts()
        return parts["report"], parts["certificates"]

    return TsmKernel(sign)


def collector(machine: SnpMachine) -> TsmCollector:
    """The production collector on that kernel."""
    return TsmCollector.detect(REPORTS, files=MemoryFiles(snp_kernel(machine), REPORTS))


def policy_text(
    machine: SnpMachine,
    gpus: Sequence[Device] = (),
    *,
    requirements: Requirements | None = None,
    measurement: str | None = None,
    separate_nodes: bool = False,
) -> str:
    """A policy in YAML that pins the machine and its GPUs."""
    chosen = requirements or machine.requirements()
    document = {
        "version": 1,
        "name": "hardware",
        "protect": {"prompt": "attested", "activations": "attested", "weights": "attested"},
        "evidence": ["sev-snp", *(["nvidia"] if gpus else [])],
        "measurements": {"sev-snp": [measurement or machine.measurement.hex()]},
        "requirements": {"sev-snp": chosen.to_document()},
        "separate_nodes": separate_nodes,
        "ingress": "plain",
        "accept": ["unhardened", "plain_ingress", "plain_weights"],
    }
    if gpus:
        pinned = nvidia_machine.expectations(gpus).requirements.to_document()
        document["requirements"]["nvidia"] = pinned  # type: ignore[index]
    return json.dumps(document, indent=1)


def write_collateral(directory: Path, collateral: Collateral) -> Path:
    """As an operator's job would."""
    directory.mkdir(exist_ok=True)
    for number, der in enumerate(collateral.certificates):
        (directory / f"certificate-{number}.der").write_bytes(der)
    for number, der in enumerate(collateral.crls):
        (directory / f"list-{number}.crl").write_bytes(der)
    for name, xml in collateral.rims:
        (directory / name).write_bytes(xml)
    return directory


@dataclass
class HardwareLab(Lab):
    """A broker with a collateral directory."""

    collateral: Collateral = field(default_factory=Collateral)

    def __post_init__(self) -> None:
        self.clock = Clock()
        self.clock.now = float(NOW)
        write_collateral(self.path / "collateral", self.collateral)
        super().__post_init__()
        self.install()

    def start(self) -> KeyBroker:
        self.close()
        return KeyBroker(
            BrokerStore(self.home),
            self.owner_public,
            clock=self.clock,
            collateral=CollateralDirectory(self.path / "collateral"),
        )
