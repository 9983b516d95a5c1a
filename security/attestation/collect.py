"""Picks the way in which this machine can prove itself."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from security.attestation.enrolled import KIND as ENROLLED
from security.attestation.enrolled import EnrolledCollector
from security.attestation.evidence import Evidence
from security.attestation.simulated import KIND as SIMULATED
from security.attestation.simulated import SimulatedCollector
from security.errors import NoCollector


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
    """
    for kind in accepted:
        if kind == SIMULATED:
            return SimulatedCollector(node, region)
        if kind == ENROLLED and node_key_path is not None:
            return EnrolledCollector.from_file(node, node_key_path)
    offered = [SIMULATED] + ([ENROLLED] if node_key_path is not None else [])
    raise NoCollector(
        f"node {node!r}: expected a way to make evidence of kind {' or '.join(accepted)}, found "
        f"only {', '.join(offered)}; place the role on another machine, or give this one a node key"
    )
