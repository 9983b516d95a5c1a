"""Real evidence: every SEV-SNP sample gets its verdict, for its reason, at its dates."""

from __future__ import annotations

import base64
import json
import time
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from evidence_samples import EVIDENCE, needs_evidence
from snp_machine import table

from placement.requirements import Requirements
from security.attestation.certificates import read_certificate, read_revocation_list
from security.attestation.collateral import Collateral
from security.attestation.errors import SnpReportMalformed, SnpReservedNotZero
from security.attestation.sev_snp import judge_report, verify_endorsement, verify_sev_snp
from security.attestation.snp_certificates import AMD_ROOTS
from security.attestation.snp_report import Product, parse_report
from security.attestation.verdict import Expectations, Verdict

pytestmark = needs_evidence

SNP = EVIDENCE / "snp"
OPEN = (
    *("product", "signing_key", "vmpl", "host_data", "id_key_digest", "author_key_digest"),
    *("family_id", "image_id", "chip_id", "csp_id", "minimum_tcb", "migration_agent"),
    *("freshness", "revocation"),
)


def at(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp())


@pytest.fixture(autouse=True)
def _no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@cache
def expected_fields(sample: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EVIDENCE / "expected.json").read_text())[sample]["fields"]
    return found


@cache
def octets(path: str) -> bytes:
    return (SNP / path).read_bytes()


@cache
def vendor() -> Collateral:
    """All of AMD's certificates and lists: every product, VCEK and VLEK."""
    certificates = tuple(
        certificate.public_bytes(Encoding.DER)
        for path in sorted(SNP.glob("roots/*.pem"))
        for certificate in x509.load_pem_x509_certificates(path.read_bytes())
    )
    lists = tuple(path.read_bytes() for path in sorted(SNP.glob("roots/crl_*.der")))
    return Collateral(certificates, lists)


@cache
def azure(sample: str) -> tuple[bytes, bytes]:
    """The inner report of an Azure sample, and its VCEK."""
    document = json.loads(octets(f"{sample}/evidence.json"))
    if "report" in document:
        blob, pem = bytes(document["report"]), document["vcek"]
        text = pem if isinstance(pem, str) else bytes(pem).decode()
        body = "".join(line for line in text.splitlines() if "-----" not in line)
        return blob[32:1216], base64.b64decode(body)
    blob, vcek = (
        base64.urlsafe_b64decode(document[name] + "=" * (-len(document[name]) % 4))
        for name in ("hcl_report", "vcek")
    )
    return blob[32:1216], vcek


def judged(
    report: bytes,
    *certificates: bytes,
    now: int,
    expected: Expectations | None = None,
    bound_to: bytes | None = None,
) -> Verdict:
    parts = {"report": report, "certificates": table(*(("VCEK", der) for der in certificates))}
    return verify_sev_snp(parts, vendor(), expected, now, bound_to)


def policy(pins: dict[str, tuple[str, ...]] | None = None, *closed: str) -> Expectations:
    opened = tuple(name for name in OPEN if name not in closed and name not in (pins or {}))
    return Expectations("sev-snp", Requirements(pins=pins or {}, open=opened), None)


def codes(verdict: Verdict) -> list[str]:
    return [failure.code for failure in verdict.failures]


def test_amds_roots_are_those_that_are_pinned() -> None:
    roots = {
        read_certificate(der).subject.common_name: read_certificate(der).fingerprint
        for der in vendor().certificates
    }
    assert {product: roots[f"ARK-{product.value}"] for product in Product} == dict(AMD_ROOTS)


@pytest.mark.parametrize(
    "sample",
    [
        "milan-debug",
        "milan-azure-2023",
        "milan-vlek-aws-vmpl1",
        "genoa-tinfoil",
        "genoa-azure-vtpm",
        "milan-azure-vtpm",
    ],
)
def test_every_field_is_read_as_expected(sample: str) -> None:
    fields = expected_fields(f"snp/{sample}")
    data = azure(sample)[0] if "vtpm" in sample else octets(f"{sample}/report.bin")
    report = parse_report(data)
    assert report.version == fields["version"]
    assert report.guest_svn == fields["guest_svn"]
    assert report.policy.raw == int(fields["policy"], 16)
    assert report.policy.debug is fields["debug"]
    assert report.policy.migrate_ma is fields["migrate_ma"]
    assert report.vmpl == fields["vmpl"]
    assert report.platform_info.raw == int(fields["platform_info"], 16)
    assert report.key_info.signing_key.name == fields["signing_key"]
    assert bytes(report.cpuid or (0, 0, 0)).hex() == fields["cpuid_fms"]
    for name in (
        *("current_tcb", "reported_tcb", "committed_tcb", "launch_tcb", "chip_id"),
        *("report_data", "measurement", "host_data", "id_key_digest", "report_id", "report_id_ma"),
    ):
        assert getattr(report, name).hex() == fields[name]


# -- verdicts ---------------------------------------------------------------------------------


def test_milan_debug_is_refused_only_for_debug() -> None:
    report, vcek = octets("milan-debug/report.bin"), octets("milan-debug/vcek.der")
    for expected in (None, policy()):
        verdict = judged(report, vcek, now=at("2025-01-01"), expected=expected)
        assert codes(verdict) == ["snp_debug_allowed"]
    assert codes(judged(report, vcek, now=at("2022-09-23"))) == [
        "snp_certificate_not_yet_valid",
        "snp_debug_allowed",
    ]


@pytest.mark.parametrize("day", ["2023-01-25", "2025-01-01", "2026-11-25", "2030-01-24"])
def test_milan_azure_2023_is_taken(day: str) -> None:
    report, vcek = octets("milan-azure-2023/report.bin"), octets("milan-azure-2023/vcek.der")
    verdict = judged(report, vcek, now=at(day))
    assert verdict.holds
    assert verdict.product == "Milan"
    assert verdict.identity.startswith("c38427a3")
    assert verdict.measurement.startswith("a1f39304")
    bound_to = bytes.fromhex(expected_fields("snp/milan-azure-2023")["report_data"])[:32]
    assert judged(report, vcek, now=at(day), expected=policy(), bound_to=bound_to).holds
    assert codes(judged(report, vcek, now=at(day), bound_to=b"other")) == ["evidence_not_bound"]


def test_milan_azure_2023_is_refused_outside_its_dates() -> None:
    report, vcek = octets("milan-azure-2023/report.bin"), octets("milan-azure-2023/vcek.der")
    assert codes(judged(report, vcek, now=at("2023-01-24"))) == ["snp_certificate_not_yet_valid"]
    assert codes(judged(report, vcek, now=at("2030-01-25"))) == ["snp_certificate_expired"]


@pytest.mark.parametrize("name", ["bad-vcek-legacy.der", "bad-vcek-new.der"])
def test_bad_vceks_are_refused(name: str) -> None:
    report, bad = octets("milan-azure-2023/report.bin"), octets(f"milan-azure-2023/{name}")
    verdict = judged(report, bad, now=at("2025-01-01"))
    assert codes(verdict) == [
        "snp_report_signature_invalid",
        "snp_tcb_mismatch",
        "snp_chip_mismatch",
        "snp_chain_signature_invalid",
    ]
    good = octets("milan-azure-2023/vcek.der")
    assert judged(report, bad, good, now=at("2025-01-01")).holds
    lone = verify_endorsement(bad, vendor(), at("2025-01-01"))
    assert codes(lone) == ["snp_chain_signature_invalid"]


def test_aws_vlek_is_taken_in_its_year_by_a_policy_that_opens_the_chip() -> None:
    report = octets("milan-vlek-aws-vmpl1/report.bin")
    vlek = octets("milan-vlek-aws-vmpl1/vlek.der")
    pins = {
        "csp_id": ("CN=cc-us-east-2.amazonaws.com",),
        "signing_key": ("VLEK",),
        "vmpl": ("0", "1"),
    }
    verdict = judged(report, vlek, now=at("2025-06-01"), expected=policy(pins))
    assert verdict.holds
    assert verdict.identity == ""
    assert any("nothing tells this machine" in note for note in verdict.notes)
    for day, code in (
        ("2024-12-10", "snp_certificate_not_yet_valid"),
        ("2026-01-01", "snp_certificate_expired"),
    ):
        assert codes(judged(report, vlek, now=at(day), expected=policy(pins))) == [code]
    strict = pins | {"vmpl": ("0",)}
    assert codes(judged(report, vlek, now=at("2025-06-01"), expected=policy(strict))) == [
        "pin_refused"
    ]
    masked = policy(pins, "chip_id")
    assert codes(judged(report, vlek, now=at("2025-06-01"), expected=masked)) == ["pin_missing"]


def test_genoa_without_its_vcek_is_refused() -> None:
    report = octets("genoa-tinfoil/report.bin")
    assert codes(judged(report, now=at("2025-06-01"))) == ["snp_endorsement_missing"]
    others = (octets("milan-debug/vcek.der"), azure("genoa-azure-vtpm")[1])
    assert "snp_report_signature_invalid" in codes(judged(report, *others, now=at("2025-06-01")))


def test_turins_certificate_is_judged_alone() -> None:
    vcek = octets("turin-vcek-only/vcek.der")
    verdict = verify_endorsement(vcek, vendor(), at("2025-01-01"))
    assert verdict.holds
    assert verdict.product == "Turin"
    assert verdict.identity == "1e550a8ee5cf9f4d".ljust(128, "0")
    assert verdict.fields["VCEK.TCB"].endswith("(fmc 0, bootloader 0, tee 0, snp 0, microcode 9)")
    assert codes(verify_endorsement(vcek, vendor(), at("2024-11-06"))) == [
        "snp_certificate_not_yet_valid"
    ]
    assert codes(verify_endorsement(vcek, Collateral(), at("2025-01-01"))) == ["snp_issuer_missing"]


@pytest.mark.parametrize("sample", ["genoa-azure-vtpm", "milan-azure-vtpm"])
def test_reports_inside_azures_evidence_are_taken(sample: str) -> None:
    report, vcek = azure(sample)
    judgement = judge_report(report, [vcek], vendor(), None, at("2025-06-01"))
    assert [check.failure for check in judgement.checks if check.failure] == []
    digest = bytes.fromhex(expected_fields(f"snp/{sample}")["report_data"])
    assert judgement.report.report_data == digest


# -- revocation -------------------------------------------------------------------------------


def test_the_list_of_genoa_names_an_ask_that_is_not_ours() -> None:
    revoked = read_revocation_list(octets("roots/crl_genoa.der"))
    assert revoked.revoked == {0x20001}
    report, vcek = azure("genoa-azure-vtpm")
    closed = policy(None, "revocation")
    assert judged(report, vcek, now=at("2025-06-01"), expected=closed).holds
    late = judged(report, vcek, now=at("2025-12-01"), expected=closed)
    assert codes(late) == ["snp_revocation_unknown"]
    assert judged(report, vcek, now=at("2025-12-01"), expected=policy()).holds


def test_the_list_of_milan_is_current_in_its_year() -> None:
    report, vcek = octets("milan-azure-2023/report.bin"), octets("milan-azure-2023/vcek.der")
    closed = policy(None, "revocation")
    assert judged(report, vcek, now=at("2025-06-01"), expected=closed).holds
    for day in ("2025-05-06", "2026-05-13"):
        verdict = judged(report, vcek, now=at(day), expected=closed)
        assert codes(verdict) == ["snp_revocation_unknown"]


# -- mutations --------------------------------------------------------------------------------


# Offsets of MEASUREMENT, REPORT_DATA, POLICY, CHIP_ID, VMPL and GUEST_SVN.
@pytest.mark.parametrize("offset", [0x90, 0x50, 0x08, 0x1A0, 0x30, 0x04])
def test_a_flipped_bit_breaks_the_signature(offset: int) -> None:
    report = bytearray(octets("milan-azure-2023/report.bin"))
    report[offset] ^= 1
    verdict = judged(bytes(report), octets("milan-azure-2023/vcek.der"), now=at("2025-01-01"))
    assert "snp_report_signature_invalid" in codes(verdict)


def test_clearing_debug_breaks_the_signature() -> None:
    report = bytearray(octets("milan-debug/report.bin"))
    report[0x0A] &= ~0x08
    verdict = judged(bytes(report), octets("milan-debug/vcek.der"), now=at("2025-01-01"))
    assert codes(verdict) == ["snp_report_signature_invalid"]


@pytest.mark.parametrize("offset", [0x18C, 0x29F, 0x330, 0x2A0 + 60])
def test_a_flipped_reserved_byte_is_refused(offset: int) -> None:
    report = bytearray(octets("milan-azure-2023/report.bin"))
    report[offset] ^= 1
    with pytest.raises(SnpReservedNotZero):
        judged(bytes(report), octets("milan-azure-2023/vcek.der"), now=at("2025-01-01"))


def test_the_vcek_of_another_machine_is_refused() -> None:
    report, other = octets("milan-azure-2023/report.bin"), octets("milan-debug/vcek.der")
    assert codes(judged(report, other, now=at("2025-01-01"))) == [
        "snp_report_signature_invalid",
        "snp_tcb_mismatch",
        "snp_chip_mismatch",
    ]
    genoa = azure("genoa-azure-vtpm")[1]
    report = azure("milan-azure-vtpm")[0]
    assert "snp_product_mismatch" in codes(judged(report, genoa, now=at("2025-06-01")))


def test_a_vlek_does_not_stand_under_the_ask() -> None:
    certificates = tuple(
        der
        for der in vendor().certificates
        if "VLEK" not in read_certificate(der).subject.common_name
    )
    verdict = verify_sev_snp(
        {"report": octets("milan-vlek-aws-vmpl1/report.bin")},
        Collateral((*certificates, octets("milan-vlek-aws-vmpl1/vlek.der"))),
        None,
        at("2025-06-01"),
        None,
    )
    assert codes(verdict) == ["snp_issuer_missing"]


@pytest.mark.parametrize("size", [0, 672, 1183, 1185, 2368])
def test_truncated_and_longer_reports_are_refused(size: int) -> None:
    report = octets("milan-azure-2023/report.bin").ljust(size, b"\0")[:size]
    with pytest.raises(SnpReportMalformed):
        judged(report, octets("milan-azure-2023/vcek.der"), now=at("2025-01-01"))


def test_a_recorded_report_is_refused_for_every_challenge() -> None:
    for sample in ("milan-azure-2023", "milan-debug"):
        verdict = judged(
            octets(f"{sample}/report.bin"),
            octets(f"{sample}/vcek.der"),
            now=at("2025-01-01"),
            expected=policy(None, "freshness"),
            bound_to=b"n" * 64,
        )
        assert "evidence_not_bound" in codes(verdict)


def test_a_verdict_takes_less_than_5_ms() -> None:
    report, vcek = octets("milan-azure-2023/report.bin"), octets("milan-azure-2023/vcek.der")
    expected = policy()
    took = []
    for _ in range(10):
        start = time.perf_counter()
        judged(report, vcek, now=at("2025-01-01"), expected=expected)
        took.append(time.perf_counter() - start)
    # The fastest: the others may have waited for a processor. Measured: about 1 ms.
    assert min(took) < 0.005
