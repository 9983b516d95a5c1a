"""Policies that pin exactly what `attest check --json` says of some evidence."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

ZERO_TCB = {"bootloader": 0, "tee": 0, "snp": 0, "microcode": 0}


def pins_of(verdict: Mapping[str, Any]) -> dict[str, Any]:
    """The requirements of the verdict's kind that accept it and nothing else."""
    kind = verdict["kind"]
    if kind == "nvidia":
        return _nvidia(verdict)
    fields = verdict["fields"]
    pins: dict[str, Any] = {}
    if "MEASUREMENT" in fields:
        pins |= _snp(verdict)
    else:
        pins |= _tdx(verdict)
    if kind == "azure-vtpm":
        pins["hardware"] = [fields["hardware"]]
        pins |= {f"pcr{i}": [fields[f"pcr{i}"]] for i in range(24)}
    return pins


def _snp(verdict: Mapping[str, Any]) -> dict[str, Any]:
    fields = verdict["fields"]
    vlek = fields["SIGNING_KEY"] == "VLEK"
    least = re.findall(r"([a-z]+) ([0-9]+)", fields["REPORTED_TCB"].partition("(")[2])
    pins: dict[str, Any] = {
        "product": [verdict["product"]],
        "signing_key": [fields["SIGNING_KEY"]],
        "vmpl": [fields["VMPL"]],
        "host_data": [fields["HOST_DATA"]],
        "id_key_digest": [fields["ID_KEY_DIGEST"]],
        "author_key_digest": [fields["AUTHOR_KEY_DIGEST"]],
        "family_id": [fields["FAMILY_ID"]],
        "image_id": [fields["IMAGE_ID"]],
        "minimum_tcb": {verdict["product"]: {name: int(value) for name, value in least}},
        # The samples' lists are from other times.
        "open": ["revocation"],
    }
    if vlek:
        pins["csp_id"] = [fields["VLEK.csp_id"]]
        pins["open"] += ["chip_id"]
    else:
        pins["chip_id"] = [fields["CHIP_ID"]]
        pins["open"] += ["csp_id"]
    return pins


def _tdx(verdict: Mapping[str, Any]) -> dict[str, Any]:
    fields = verdict["fields"]
    names = ("mrseam", "mrsignerseam", "mrconfigid", "mrowner", "mrownerconfig", "xfam", "fmspc")
    names += ("rtmr0", "rtmr1", "rtmr2", "rtmr3", "pck_serial")
    pins: dict[str, Any] = {name: [fields[name]] for name in names}
    pins["tcb_status"] = [fields.get("tcb_status", "UpToDate")]
    pins["mrservicetd"] = [fields.get("mrservicetd", "0" * 96)]
    pins["open"] = [] if fields.get("event_log_events") else ["event_log"]
    return pins


def _nvidia(verdict: Mapping[str, Any]) -> dict[str, Any]:
    devices = verdict["devices"]

    def all_of(values: list[str]) -> list[str]:
        return list(dict.fromkeys(value for value in values if value))

    return {
        "architecture": ["Hopper"],
        "driver": all_of([device["fields"].get("driver", "") for device in devices]),
        "vbios": all_of([device["fields"].get("vbios", "") for device in devices]),
        "device": all_of([device["identity"] for device in devices]),
        "gpus": [verdict["fields"]["gpus"]],
        "switches": [verdict["fields"]["switches"]],
        "open": ["revocation", "fwid", "driver_rim", "vbios_rim"],
    }


def policy_for(
    verdict: Mapping[str, Any],
    changes: Mapping[str, Any] | None = None,
    measurement: str | None = None,
) -> str:
    """A policy in YAML (JSON is YAML) that accepts the evidence, with changed requirements."""
    kind = verdict["kind"]
    requirements = pins_of(verdict)
    for name, value in (changes or {}).items():
        if value is None:
            requirements.pop(name)
        else:
            requirements[name] = value
    trust = "enrolled" if kind == "nvidia" else "attested"
    measured = verdict["measurement"] if measurement is None else measurement
    document: dict[str, Any] = {
        "version": 1,
        "name": "pinned",
        "protect": {"prompt": trust, "activations": trust, "weights": trust},
        "evidence": [kind],
        "requirements": {kind: requirements},
        "accept": ["unhardened"],
    }
    if measured:
        document["measurements"] = {kind: [measured]}
    return json.dumps(document, indent=1)
