"""Picks the ways in which this machine and its devices can prove themselves."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from security.attestation import nvml, tsm
from security.attestation.azure_collector import KIND as AZURE
from security.attestation.azure_collector import AzureCollector
from security.attestation.enrolled import KIND as ENROLLED
from security.attestation.enrolled import EnrolledCollector
from security.attestation.evidence import Evidence, encode_parts
from security.attestation.simulated import KIND as SIMULATED
from security.attestation.simulated import SimulatedCollector
from security.errors import (
    NoCollector,
    TpmFailed,
    TpmUnavailable,
    TsmProviderUnknown,
    TsmUnavailable,
)

NVIDIA = "nvidia"


class Collector(Protocol):
    """Makes one kind of evidence on this machine."""

    @property
    def kind(self) -> str:
        """The kind of evidence."""

    def collect(self, report_data: bytes) -> Evidence:
        """Evidence over the report data (64 bytes)."""


def choose_collector(
    accepted: Sequence[str], node: str, region: str | None, node_key_path: Path | None
) -> Collector:
    """The first collector of this machine whose kind the role accepts.

    Args:
        accepted: kinds that the role accepts, in the template's order.
        node: name of this node.
        region: declared region of this node, if known.
        node_key_path: key file of an enrolled node, if there is one.

    Raises:
        NoCollector: there is none.
        KeyFileError: the node's key file cannot be used.
        CollectionError: the kernel has configfs-tsm, and it failed.
    """
    hardware: Collector | None = None
    if set(accepted) & set(tsm.KINDS.values()):
        hardware = _kernel_collector()
    if hardware is None and AZURE in accepted:
        hardware = _azure_collector()
    for kind in accepted:
        if hardware is not None and kind == hardware.kind:
            return hardware
        if kind == SIMULATED:
            return SimulatedCollector(node, region)
        if kind == ENROLLED and node_key_path is not None:
            return EnrolledCollector.from_file(node, node_key_path)
    offered = [SIMULATED] + ([ENROLLED] if node_key_path is not None else [])
    offered += [hardware.kind] if hardware is not None else []
    raise NoCollector(
        f"node {node!r}: expected a way to make evidence of kind {' or '.join(accepted)}, found "
        f"only {', '.join(offered)}; place the role on another machine, or give this one a node key"
    )


def _kernel_collector() -> Collector | None:
    """The kernel's report device, if it has one of a kind that is verified."""
    try:
        return tsm.TsmCollector.detect(tsm.REPORTS, tsm.ACPI_TABLES)
    except (TsmUnavailable, TsmProviderUnknown):
        return None


def _azure_collector() -> Collector | None:
    """Azure's vTPM, if this machine has one."""
    try:
        return AzureCollector.detect()
    except (TpmUnavailable, TpmFailed):
        return None


def collect_devices(kinds: Sequence[str], nonce: bytes) -> bytes:
    """Evidence of the machine's devices, its parts joined.

    Args:
        kinds: kinds of device evidence that the policy demands.
        nonce: what the devices must answer, see `security.attestation.evidence.gpu_nonce`.

    Raises:
        NoCollector: there is no device of a kind, or no way to ask it.
    """
    unknown = [kind for kind in kinds if kind != NVIDIA]
    if unknown:
        raise NoCollector(f"device evidence: expected kind {NVIDIA}, found {unknown[0][:64]!r}")
    return encode_parts(nvml.collect_gpus(nonce)) if kinds else b""
