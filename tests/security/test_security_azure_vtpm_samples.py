"""Real evidence of Azure's confidential VMs gets the verdict that `expected.json` states."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from evidence_samples import EVIDENCE, needs_evidence

from security.attestation.azure_evidence import read_azure_evidence
from security.attestation.azure_vtpm import verify_azure_vtpm
from security.attestation.collateral import Collateral
from security.attestation.verdict import Verdict

pytestmark = needs_evidence

NOW = int(datetime(2025, 7, 1, tzinfo=UTC).timestamp())
SAMPLES = {
    "snp/genoa-azure-vtpm": set(),
    "snp/milan-azure-vtpm": set(),
    "tdx/azure-vtpm": {"tdx_collateral_missing"},
}


@cache
def stated(sample: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EVIDENCE / "expected.json").read_text())[sample]
    return found


@cache
def collateral() -> Collateral:
    certificates = [
        certificate.public_bytes(Encoding.DER)
        for product in ("genoa", "milan")
        for certificate in x509.load_pem_x509_certificates(
            (EVIDENCE / "snp" / "roots" / f"ask_ark_{product}.pem").read_bytes()
        )
    ]
    lists = [
        (EVIDENCE / "snp" / "roots" / f"crl_{product}.der").read_bytes()
        for product in ("genoa", "milan")
    ]
    return Collateral(certificates=tuple(certificates), crls=tuple(lists))


def parts(sample: str) -> dict[str, bytes]:
    return read_azure_evidence((EVIDENCE / sample / "evidence.json").read_bytes())


def bound(sample: str) -> bytes:
    return bytes.fromhex(stated(sample)["vtpm"]["tpm_extra_data"])


def verify(sample: str, bound_to: bytes | None = None, **changed: bytes) -> Verdict:
    challenge = bound(sample) if bound_to is None else bound_to
    return verify_azure_vtpm(parts(sample) | changed, collateral(), None, NOW, challenge)


def codes(verdict: Verdict) -> set[str]:
    return {failure.code for failure in verdict.failures}


@pytest.mark.parametrize("sample", SAMPLES)
def test_samples(sample: str) -> None:
    verdict = verify(sample)
    assert codes(verdict) == SAMPLES[sample]
    said = stated(sample)
    fields = said["fields"]
    assert verdict.measurement == fields.get("measurement", fields.get("mrtd"))
    for name, value in said["vtpm"].items():
        shown = "runtime_claims_sha256" if name == "runtime_sha256" else name
        assert verdict.fields[shown] == value


@pytest.mark.parametrize("sample", SAMPLES)
def test_a_live_challenge_refuses_recorded_evidence(sample: str) -> None:
    assert codes(verify(sample, b"live")) == SAMPLES[sample] | {"evidence_not_bound"}


@pytest.mark.parametrize("sample", SAMPLES)
def test_mutations(sample: str) -> None:
    good = parts(sample)

    def flipped(name: str, offset: int) -> set[str]:
        changed = bytearray(good[name])
        changed[offset] ^= 1
        return codes(verify(sample, **{name: bytes(changed)})) - SAMPLES[sample]

    assert flipped("pcrs", 40) == {"pcr_digest_mismatch"}
    assert flipped("tpm_signature", 40) == {"tpm_signature_invalid"}
    assert "tpm_signature_invalid" in flipped("tpm_message", -1)
    # A letter within the claims: the JSON still parses, the hardware report no longer fits.
    offset = good["hcl_report"].index(b"vmUniqueId") + 14
    assert flipped("hcl_report", offset) == {"runtime_data_mismatch"}
    if "td_quote" in good:
        assert "quote_signature_invalid" in flipped("td_quote", 48 + 136)
        assert "td_report_mismatch" in flipped("hcl_report", 32 + 528)
    else:
        assert "snp_report_signature_invalid" in flipped("hcl_report", 32 + 0x90)


def test_endorsement_of_another_machine() -> None:
    other = parts("snp/milan-azure-vtpm")["vcek"]
    assert codes(verify("snp/genoa-azure-vtpm", vcek=other))


def test_parts_of_two_machines() -> None:
    other = parts("snp/milan-azure-vtpm")
    found = codes(
        verify(
            "snp/genoa-azure-vtpm",
            tpm_message=other["tpm_message"],
            tpm_signature=other["tpm_signature"],
            pcrs=other["pcrs"],
        )
    )
    assert found == {"tpm_signature_invalid", "evidence_not_bound"}
