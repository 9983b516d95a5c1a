"""Every rule of the TDX verifier refuses what it must, on evidence made here."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import tdx_machine as machine
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from tdx_machine import DAY, NOW, Platform, collateral, issue, level, quote, vendor

from placement.requirements import PINS, Requirements
from security.attestation import dcap, tdx_collateral_rules
from security.attestation.collateral import Collateral
from security.attestation.dcap import SecondOpinion
from security.attestation.errors import (
    NotATdQuote,
    PinMissing,
    QuoteAlgorithmRefused,
    QuoteVersionUnsupported,
)
from security.attestation.tdx import TDX_RULES, verify_tdx
from security.attestation.verdict import Expectations, Verdict
from security.errors import AppraisalError, EvidenceMalformed

EVENTS = [
    (1, 0x80000001, b"firmware"),
    (1, 0x00000004, b"\0\0\0\0"),
    (2, 0x80000003, b"boot loader"),
    (3, 0x0000000D, b"kernel"),
    (0, 0x00000003, b"no action"),
    (4, 0x0000000D, b"application"),
]
REPORT_DATA = bytes(range(64))


def requirements(**changes: Any) -> Requirements:
    """Pins of the default machine; `unpin` takes some away, `open` opens names."""
    registers = machine.default_registers()
    pins = {
        name: (registers[name].hex(),)
        for name in PINS["tdx"]
        if name in registers and name != "mrtd"
    }
    pins |= {
        "xfam": ("e702060000000000",),
        "fmspc": ("b0c06f000000",),
        "pck_serial": ("1234abcd",),
        "tcb_status": ("UpToDate",),
    }
    pins |= changes.pop("pins", {})
    for name in changes.pop("unpin", ()):
        pins.pop(name, None)
    arguments: dict[str, Any] = {"open": ("event_log",), "roots": vendor().roots}
    return Requirements(pins=pins, **(arguments | changes))


def policy(measurements: tuple[str, ...] | None = None, **changes: Any) -> Expectations:
    if measurements is None:
        measurements = (machine.default_registers()["mrtd"].hex(),)
    return Expectations("tdx", requirements(**changes), measurements)


def verify(
    data: bytes | None = None,
    documents: tuple[bytes, ...] | None = None,
    *,
    expected: Expectations | None = None,
    now: int = NOW,
    bound_to: bytes | None = REPORT_DATA,
    **parts: bytes,
) -> Verdict:
    return verify_tdx(
        {"quote": quote(report_data=REPORT_DATA) if data is None else data, **parts},
        Collateral(tdx=(collateral(),) if documents is None else documents),
        expected or policy(),
        now,
        bound_to,
    )


def codes(verdict: Verdict) -> set[str]:
    return {failure.code for failure in verdict.failures}


def bound(**changes: Any) -> bytes:
    return quote(report_data=REPORT_DATA, **changes)


# -- what holds -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes", [{}, {"version": 5, "body_type": 2}, {"version": 5, "body_type": 3}]
)
def test_everything_holds(changes: dict[str, Any]) -> None:
    verdict = verify(bound(**changes))
    verdict.require()
    assert verdict.kind == "tdx"
    assert verdict.measurement == machine.default_registers()["mrtd"].hex()
    assert verdict.identity == bytes(range(16)).hex()
    assert verdict.fields["tcb_status"] == "UpToDate"
    assert verdict.fields["tcb_date"] == "2024-03-13T00:00:00Z"
    names = [check.name for check in verdict.checks]
    assert len(set(names)) == len(names)
    assert {"tdx.signature", "tdx.dcap_qvl", "tdx.freshness", "tdx.mrtd"} <= set(names)


def test_log_that_replays_holds() -> None:
    registers = machine.replay(EVENTS)
    expected = policy(open=(), pins={name: (value.hex(),) for name, value in registers.items()})
    for padding in (b"", b"\xff" * 100, bytes(100)):
        verdict = verify(
            bound(**registers),
            expected=expected,
            event_log=machine.event_log(EVENTS, padding),
            event_table=machine.ccel_table(),
        )
        verdict.require()
        assert verdict.fields["event_log_events"] == "6"


def test_zero_padding_is_noted() -> None:
    verdict = verify(bound(trailing=bytes(70)))
    verdict.require()
    assert any("70 bytes of zero" in note for note in verdict.notes)


def test_without_policy_only_soundness_is_judged() -> None:
    # Intel's root is pinned then, so the chains of this machine fail, and nothing else does.
    verdict = verify_tdx(
        {"quote": bound(tdattributes=0, version=5, body_type=3, mrservicetd=b"s" * 48)},
        Collateral(tdx=(collateral(),)),
        None,
        NOW,
        None,
    )
    assert codes(verdict) == {"pck_root_unknown", "tdx_collateral_chain_invalid"}
    assert any("freshness" in note for note in verdict.notes)
    assert any("pin" in note for note in verdict.notes)


def test_report_data_may_be_shorter() -> None:
    verify(quote(report_data=b"short"), bound_to=b"short").require()


def test_service_td_may_be_pinned_or_opened() -> None:
    hashed = b"\x38" * 48
    data = bound(version=5, body_type=3, mrservicetd=hashed)
    verify(data, expected=policy(pins={"mrservicetd": (hashed.hex(),)})).require()
    verify(data, expected=policy(open=("event_log", "mrservicetd"))).require()


def test_sept_ve_disable_may_be_opened() -> None:
    expected = policy(open=("event_log", "sept_ve_disable"))
    verify(bound(tdattributes=0), expected=expected).require()


def test_known_attributes_hold() -> None:
    for bit in (16, 27, 30, 31, 63):
        verify(bound(tdattributes=machine.SEPT_VE_DISABLE | 1 << bit)).require()


@pytest.mark.parametrize(
    ("changes", "status"),
    [
        ({"tee_tcb_svn": bytes([4, 1, 3]) + bytes(13)}, "OutOfDate"),
        ({"qe_isvsvn": 3}, "OutOfDate"),
        (
            {"tee_tcb_svn": bytes([4, 1, 3]) + bytes(13), "version": 5, "body_type": 3},
            "TDRelaunchAdvised",
        ),
    ],
)
def test_status_is_what_the_policy_pins(changes: dict[str, Any], status: str) -> None:
    data = bound(**changes)
    assert codes(verify(data)) == {"pin_refused"}
    verify(data, expected=policy(pins={"tcb_status": (status,)})).require()
    assert verify(data).fields["tcb_status"] == status


def test_configuration_and_age_add_up() -> None:
    info = machine.tcb_info(
        tcbLevels=[level((2, 2, 2, 2, 3, 1, 0, 5), (5, 0, 2), 11, "ConfigurationNeeded", ("A-1",))]
    )
    status = "OutOfDateConfigurationNeeded"
    verdict = verify(
        bound(tee_tcb_svn=bytes([4, 1, 3]) + bytes(13)),
        (collateral(tcb_info=info),),
        expected=policy(pins={"tcb_status": (status,)}),
    )
    verdict.require()
    assert verdict.fields["advisory_ids"] == "A-1"
    assert any("A-1" in note for note in verdict.notes)


def test_module_of_version_0_has_no_level() -> None:
    svn = bytes([5, 0, 2]) + bytes(13)
    verify(bound(tee_tcb_svn=svn)).require()


def test_best_document_is_chosen() -> None:
    stale = machine.tcb_info(
        issueDate=machine.text(NOW - 60 * DAY), nextUpdate=machine.text(NOW - 9)
    )
    other = machine.tcb_info(fmspc="90C06F000000")
    documents = (
        b"not JSON",
        collateral(tcb_info=other),
        collateral(tcb_info=stale),
        collateral(pck_crl=machine.revocation_list(vendor().pck_ca)),
        collateral(tcb_info=machine.tcb_info(id="SGX")),
    )
    for order in (documents, documents[::-1]):
        verdict = verify(documents=order)
        verdict.require()
        assert any("ignored" in note for note in verdict.notes)


def test_later_revocation_list_is_used() -> None:
    later = machine.revocation_list(vendor().pck_ca, dates=(NOW + DAY, NOW + 2 * DAY))
    verdict = verify(documents=(collateral(pck_crl=later),))
    verdict.require()
    assert any("issued later" in note for note in verdict.notes)


# -- what is refused before anything is judged -----------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"tee_type": 0}, NotATdQuote),
        ({"version": 3, "tee_type": 0}, NotATdQuote),
        ({"version": 3}, NotATdQuote),
        ({"version": 5, "body_type": 1}, NotATdQuote),
        ({"version": 6}, QuoteVersionUnsupported),
        ({"version": 5, "body_type": 4}, QuoteVersionUnsupported),
        ({"attestation_key_type": 3}, QuoteAlgorithmRefused),
        ({"vendor_id": bytes(16)}, QuoteAlgorithmRefused),
        ({"certification_type": 5}, QuoteAlgorithmRefused),
        ({"pck_certification_type": 1}, QuoteAlgorithmRefused),
        ({"version": 5, "body_type": 3, "reserved": 1}, EvidenceMalformed),
        ({"chain": b""}, EvidenceMalformed),
        ({"chain": b"no certificate"}, EvidenceMalformed),
        ({"qe_auth": bytes(1025)}, EvidenceMalformed),
    ],
)
def test_malformed(changes: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        verify(quote(**changes))


def test_every_cut_is_malformed() -> None:
    data = quote()
    for size in [*range(0, 700, 7), *range(700, len(data), 97), len(data) - 1]:
        with pytest.raises(EvidenceMalformed):
            verify(data[:size])


def test_lengths_beyond_the_data_are_malformed() -> None:
    data = quote()
    for offset, size in ((632, 4), (632 + 4 + 128 + 2, 4)):
        for value in (0, 1, (1 << 31) - 1, (1 << 32) - 1):
            changed = data[:offset] + value.to_bytes(size, "little") + data[offset + size :]
            with pytest.raises(EvidenceMalformed):
                verify(changed)


def test_parts_are_closed() -> None:
    with pytest.raises(EvidenceMalformed, match="quote"):
        verify_tdx({}, Collateral(), None, NOW, None)
    with pytest.raises(EvidenceMalformed, match="surprise"):
        verify(surprise=b"")
    with pytest.raises(EvidenceMalformed, match="65536"):
        verify(quote() + bytes(1 << 16))


@pytest.mark.parametrize(
    "platform",
    [
        b"",
        machine.der(0x30, b""),
        machine.der(0x04, b"x"),
        Platform().extension() + b"\0",
        Platform().extension()[:-3],
        Platform(fmspc=bytes(5)).extension(),
        Platform(sgx_type=9).extension(),
        Platform(components=tuple(range(15))).extension(),
    ],
)
def test_pck_extension_must_be_complete(platform: bytes) -> None:
    pck = vendor().pck(extension=platform)
    with pytest.raises(EvidenceMalformed, match="SGX extension"):
        verify(quote(pck=pck))


@pytest.mark.parametrize(
    ("found", "instead"),
    [
        (b"\xa0\x03\x02\x01\x02", b"\xa0\x03\x02\x01\x6a"),
        (b"\x06\x03\x55\x1d\x0f", b"\x06\x03\x55\x1d\x13"),
        (b"\x03\x42\x00\x04", b"\x03\x42\x00\x05"),
        (b"\x02\x04\x12\x34\xab\xcd", b"\x02\x04\x92\x34\xab\xcd"),
    ],
)
def test_odd_certificates_are_refused(found: bytes, instead: bytes) -> None:
    # A version that does not exist, an extension twice, a key that is no point, a number below 0.
    changed = machine.default_pck().der.replace(found, instead)
    assert changed != machine.default_pck().der
    pem = b"-----BEGIN CERTIFICATE-----\n" + base64.encodebytes(changed)
    pem += b"-----END CERTIFICATE-----\n"
    with pytest.raises(EvidenceMalformed):
        verify(quote(chain=pem + vendor().pck_ca.pem + vendor().root.pem))


def test_pck_without_extension() -> None:
    with pytest.raises(EvidenceMalformed, match="SGX extension"):
        verify(quote(pck=vendor().pck(extra=[])))


# -- what is refused -------------------------------------------------------------------------------


def _flip(data: bytes, offset: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1]) + data[offset + 1 :]


def _chain(*certificates: machine.Issued) -> bytes:
    return b"".join(certificate.pem for certificate in certificates)


def _quote_cases() -> Iterator[tuple[str, bytes, set[str]]]:
    """Quotes with one fault each, and the codes that name it."""
    good = bound()
    ca, root = vendor().pck_ca, vendor().root
    pck = machine.default_pck()
    for name, offset in (("mrtd", 48 + 136), ("report data", 48 + 520), ("rtmr0", 48 + 328)):
        codes = {"mrtd": "measurement_refused", "rtmr0": "pin_refused"}
        code = codes.get(name, "evidence_not_bound")
        yield f"byte of {name} flipped", _flip(good, offset), {"quote_signature_invalid", code}
    yield "signature flipped", _flip(good, 640), {"quote_signature_invalid"}
    key = _flip(good, 700)
    yield "attestation key flipped", key, {"quote_signature_invalid", "qe_binding_invalid"}
    report = _flip(good, 632 + 4 + 128 + 6)
    yield "QE report flipped", report, {"qe_signature_invalid"}
    yield "QE signature flipped", _flip(good, 632 + 4 + 128 + 6 + 384), {"qe_signature_invalid"}
    yield "QE binds another key", bound(qe_report_data=bytes(64)), {"qe_binding_invalid"}
    digest = bytes(32) + b"\1" * 32
    yield "QE binds more", bound(qe_report_data=digest), {"qe_binding_invalid"}
    yield "text after the quote", bound(trailing=b" # text"), {"quote_trailing_bytes"}

    wrong_ca = issue("Intel SGX PCK Other CA", root, path_length=0)
    under_wrong = _again(issuer=wrong_ca)
    yield (
        "CA of another name",
        bound(pck=under_wrong, chain=_chain(under_wrong, wrong_ca, root)),
        {"pck_chain_invalid", "intel_crl_signature_invalid"},
    )
    renamed = _again(name="Intel SGX TCB Signing")
    yield "leaf of another purpose", bound(pck=renamed), {"pck_chain_invalid"}
    is_ca = _again(ca=True)
    yield "leaf that is a CA", bound(pck=is_ca), {"pck_chain_invalid"}
    idle = _again(signs_data=False)
    yield "leaf that must not sign", bound(pck=idle), {"pck_chain_invalid"}
    weak = _again(digest=hashes.SHA384())
    yield "leaf signed with another hash", bound(pck=weak), {"pck_chain_invalid"}
    extension = machine.Platform().extension()
    critical = _again(
        extra=[
            (x509.UnrecognizedExtension(x509.ObjectIdentifier(machine.SGX_OID), extension), False),
            (x509.UnrecognizedExtension(x509.ObjectIdentifier("1.2.3.4"), b"\5\0"), True),
        ]
    )
    yield "unknown critical extension", bound(pck=critical), {"pck_chain_invalid"}
    forged_ca = issue(machine.PLATFORM_CA, root, path_length=0)
    yield (
        "CA of the same name, another key",
        bound(chain=_chain(pck, forged_ca, root)),
        {"pck_chain_invalid", "intel_crl_signature_invalid"},
    )
    no_ca = issue(machine.PLATFORM_CA, root, ca=False, key=ca.key)
    yield "CA that is none", bound(chain=_chain(pck, no_ca, root)), {"pck_chain_invalid"}
    yield "chain without its root", bound(chain=_chain(pck, ca)), _SHORT_CHAIN
    yield "chain of four", bound(chain=_chain(pck, ca, root, root)), {"pck_chain_invalid"}
    other = issue("Intel SGX Root CA", None, path_length=1)
    under_other = issue(machine.PLATFORM_CA, other, path_length=0, key=ca.key)
    yield (
        "chain to another root",
        bound(chain=_chain(pck, under_other, other)),
        {"pck_root_unknown", "intel_crl_signature_invalid"},
    )
    same_root = issue("Intel SGX Root CA", None, path_length=0, key=root.key)
    yield (
        "root with another certificate",
        bound(chain=_chain(pck, ca, same_root)),
        {"pck_root_unknown", "pck_chain_invalid"},
    )
    for dates in ((NOW - 9 * DAY, NOW - 1), (NOW + 1, NOW + 9 * DAY)):
        yield "leaf outside of its dates", bound(pck=_again(dates=dates)), {"pck_chain_expired"}
    old_ca = issue(
        machine.PLATFORM_CA, root, path_length=0, key=ca.key, dates=(NOW - 9 * DAY, NOW - 1)
    )
    yield "CA outside of its dates", bound(chain=_chain(pck, old_ca, root)), {"pck_chain_expired"}

    sept = machine.SEPT_VE_DISABLE
    yield "debug", bound(tdattributes=sept | 1), {"td_debug"}
    for bit in (1, 4, 5, 6, 7, 8, 17, 26, 32, 62):
        data = bound(tdattributes=sept | 1 << bit)
        yield f"reserved attribute {bit}", data, {"td_attributes_reserved"}
    yield "migratable", bound(tdattributes=sept | 1 << 29), {"td_migratable"}
    yield "#VE by the host", bound(tdattributes=0), {"sept_ve_not_disabled", "dcap_qvl_refused"}
    seam = bytes([1]) + bytes(7)
    yield (
        "SEAM attributes",
        bound(seamattributes=seam),
        {"seam_attributes_not_zero", "tdx_module_mismatch"},
    )
    for svn2 in ([5, 1, 3], [6, 0, 3], [6, 1, 2], [9, 1, 2]):
        data = bound(version=5, body_type=3, tee_tcb_svn2=bytes(svn2) + bytes(13))
        yield f"older module now {svn2}", data, {"tee_tcb_svn_lowered"}
    yield (
        "service TD",
        bound(version=5, body_type=3, mrservicetd=b"\x38" * 48),
        {"service_td_bound", "dcap_qvl_refused"},
    )
    yield "another MRTD", bound(mrtd=bytes(48)), {"measurement_refused"}
    yield "another XFAM", bound(xfam=3), {"pin_refused"}
    for name in machine.default_registers():
        if name in PINS["tdx"]:
            expected = {"pin_refused"}
            if name == "mrsignerseam":
                expected |= {"tdx_module_mismatch"}
            yield f"another {name}", bound(**{name: b"\7" * 48}), expected
    yield "QE of another signer", bound(qe_signer=bytes(32)), {"qe_identity_mismatch"}
    yield "QE of another product", bound(qe_isvprodid=1), {"qe_identity_mismatch"}
    yield "QE with MISCSELECT", bound(qe_miscselect=1), {"qe_identity_mismatch"}
    attributes = bytes([0x11, 1]) + bytes(14)
    yield "QE with attributes", bound(qe_attributes=attributes), {"qe_identity_mismatch"}
    debug = bytes([0x13]) + bytes(15)
    yield "QE in debug mode", bound(qe_attributes=debug), {"qe_identity_mismatch"}
    yield "QE older than all levels", bound(qe_isvsvn=1), {"qe_identity_mismatch"}
    for svn in ([6, 1, 0], [0, 0, 0]):
        data = bound(tee_tcb_svn=bytes(svn) + bytes(13))
        yield f"TDX SVN {svn}", data, {"tcb_level_unmatched"}
    data = bound(tee_tcb_svn=bytes([6, 2, 3]) + bytes(13))
    yield "module of unknown version", data, {"tdx_module_mismatch"}
    data = bound(tee_tcb_svn=bytes([1, 1, 3]) + bytes(13))
    yield "module older than all levels", data, {"tdx_module_mismatch"}
    data = bound(tee_tcb_svn=bytes([2, 1, 3]) + bytes(13))
    yield "revoked module", data, {"tcb_revoked", "pin_refused"}
    old = _again(Platform(components=(1, 1, 1, 1, *[0] * 12)))
    yield "revoked platform", bound(pck=old), {"tcb_revoked", "pin_refused"}
    ancient = _again(Platform(components=(0,) * 16))
    yield "platform below all levels", bound(pck=ancient), {"tcb_level_unmatched"}
    pce = _again(Platform(pcesvn=4))
    yield "PCE below all levels", bound(pck=pce), {"tcb_level_unmatched"}
    foreign = _again(Platform(pceid=b"\1\0"))
    yield "another PCE", bound(pck=foreign), {"tcb_info_mismatch"}
    other_platform = _again(Platform(fmspc=bytes(6)))
    yield "another FMSPC", bound(pck=other_platform), {"fmspc_mismatch", "pin_refused"}
    yield "another PCK", bound(pck=_again(serial=77)), {"pin_refused"}


_SHORT_CHAIN = {
    "pck_chain_invalid",
    "pck_root_unknown",
    "intel_crl_signature_invalid",
}


def _again(platform: Platform | None = None, **changes: Any) -> machine.Issued:
    """A PCK certificate with the serial number that the policy pins."""
    return vendor().pck(platform, **({"serial": 0x1234ABCD} | changes))


@pytest.mark.parametrize(("what", "data", "expected"), list(_quote_cases()))
def test_quote_is_refused(what: str, data: bytes, expected: set[str]) -> None:
    assert codes(verify(data)) == expected, what


def _collateral_cases() -> Iterator[tuple[str, bytes, set[str]]]:
    info, identity = machine.tcb_info, machine.qe_identity
    root, ca = vendor().root, vendor().pck_ca
    stranger = machine.new_key()
    yield (
        "TCB info signed by another key",
        collateral(tcb_info_key=stranger),
        {"tcb_info_signature_invalid"},
    )
    yield (
        "QE identity signed by another key",
        collateral(qe_identity_key=stranger),
        {"qe_identity_signature_invalid"},
    )
    later = info(issueDate=machine.text(NOW + 1))
    yield "TCB info from the future", collateral(tcb_info=later), {"tcb_info_from_future"}
    stale = info(nextUpdate=machine.text(NOW - 1))
    yield "stale TCB info", collateral(tcb_info=stale), {"tcb_info_expired"}
    later = identity(issueDate=machine.text(NOW + 1))
    yield "QE identity from the future", collateral(qe_identity=later), {"qe_identity_from_future"}
    stale = identity(nextUpdate=machine.text(NOW - 1))
    yield "stale QE identity", collateral(qe_identity=stale), {"qe_identity_expired"}
    yield "TCB info of version 2", collateral(tcb_info=info(version=2)), {"tcb_info_mismatch"}
    yield "TCB info of SGX", collateral(tcb_info=info(id="SGX")), {"tcb_info_mismatch"}
    of_sgx = identity(id="QE")
    yield "QE identity of SGX", collateral(qe_identity=of_sgx), {"qe_identity_mismatch"}
    version_3 = identity(version=3)
    yield "QE identity of version 3", collateral(qe_identity=version_3), {"qe_identity_mismatch"}
    chain = {"tdx_collateral_chain_invalid"}
    wrong = issue("Intel SGX PCK Certificate", root, ca=False)
    yield "signer of another purpose", collateral(signer=wrong), chain
    old = issue(machine.TCB_SIGNING, root, ca=False, dates=(NOW - 9 * DAY, NOW - 1))
    yield "signer outside of its dates", collateral(signer=old), chain
    other_root = issue("Intel SGX Root CA", None, path_length=1)
    under_other = issue(machine.TCB_SIGNING, other_root, ca=False)
    yield (
        "signer under another root",
        collateral(signer=under_other, signer_root=other_root),
        chain | {"intel_crl_signature_invalid"},
    )
    unsigned = collateral(signer=under_other)
    yield "signer that the root never signed", unsigned, chain
    signer = vendor().signer.certificate.serial_number
    crl = machine.revocation_list(root, [signer])
    yield "revoked signer", collateral(root_ca_crl=crl), {"tdx_collateral_signer_revoked"}
    crl = machine.revocation_list(root, [ca.certificate.serial_number])
    yield "revoked CA", collateral(root_ca_crl=crl), {"pck_ca_revoked"}
    crl = machine.revocation_list(root, [root.certificate.serial_number])
    yield (
        "revoked root",
        collateral(root_ca_crl=crl),
        {"pck_ca_revoked", "tdx_collateral_signer_revoked"},
    )
    crl = machine.revocation_list(ca, [5, 0x1234ABCD])
    yield "revoked PCK", collateral(pck_crl=crl), {"pck_revoked"}
    spent = (NOW - 9 * DAY, NOW - 1)
    yield (
        "stale root list",
        collateral(root_ca_crl=machine.revocation_list(root, dates=spent)),
        {"intel_crl_expired"},
    )
    yield (
        "stale PCK list",
        collateral(pck_crl=machine.revocation_list(ca, dates=spent)),
        {"intel_crl_expired"},
    )
    crl_invalid = {"intel_crl_signature_invalid"}
    forged = replace(root, key=stranger)
    yield "forged root list", collateral(root_ca_crl=machine.revocation_list(forged)), crl_invalid
    yield "PCK list of the root", collateral(pck_crl=machine.revocation_list(root)), crl_invalid
    processor = issue("Intel SGX PCK Processor CA", root, path_length=0)
    crl = machine.revocation_list(processor)
    yield "list of the other CA", collateral(pck_crl=crl), crl_invalid
    yield "other platforms", collateral(tcb_info=info(fmspc="00" * 6)), {"fmspc_mismatch"}
    no_module = info()
    del no_module["tdxModuleIdentities"]
    yield "no module identities", collateral(tcb_info=no_module), {"tdx_module_mismatch"}
    bad_module = info()
    bad_module["tdxModuleIdentities"][0]["mrsigner"] = "11" * 48
    yield "module of another signer", collateral(tcb_info=bad_module), {"tdx_module_mismatch"}
    yield "no levels", collateral(tcb_info=info(tcbLevels=[])), {"tcb_level_unmatched"}
    revoked = identity(tcbLevels=[machine.module_level(1, "Revoked")])
    yield "revoked QE", collateral(qe_identity=revoked), {"tcb_revoked", "pin_refused"}


@pytest.mark.parametrize(("what", "document", "expected"), list(_collateral_cases()))
def test_collateral_is_refused(what: str, document: bytes, expected: set[str]) -> None:
    assert codes(verify(documents=(document,))) == expected, what


@pytest.mark.parametrize(
    "members",
    [
        {"tcb_info": "{}"},
        {"tcb_info": "[1]"},
        {"tcb_info": "{" * 2000},
        {"qe_identity": '{"id": 1.5}'},
        {"tcb_info_signature": "zz"},
        {"root_ca_crl": "00"},
        {"pck_crl": ""},
        {"tcb_info_issuer_chain": "none"},
        {"pck_crl_issuer_chain": "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----"},
    ],
)
def test_malformed_collateral_is_no_collateral(members: dict[str, str]) -> None:
    verdict = verify(documents=(collateral(members=members),))
    assert codes(verdict) == {"tdx_collateral_missing"}
    assert any("tdx" in note.lower() and "ignored" in note for note in verdict.notes)


@pytest.mark.parametrize(
    "change",
    [
        {"tcbStatus": "Splendid"},
        {"tcbStatus": None},
        {"tcb": {"sgxtcbcomponents": [], "tdxtcbcomponents": [], "pcesvn": 1}},
        {"tcbDate": 5},
    ],
)
def test_unknown_levels_are_malformed(change: dict[str, Any]) -> None:
    info = machine.tcb_info()
    info["tcbLevels"][0] |= change
    verdict = verify(documents=(collateral(tcb_info=info),))
    assert codes(verdict) == {"tdx_collateral_missing"}


def test_tdx_levels_without_tdx_components_are_refused() -> None:
    bare = level((9,) * 8, (5, 0, 2), 11, "UpToDate")
    del bare["tcb"]["tdxtcbcomponents"]
    info = machine.tcb_info()
    info["tcbLevels"] = [bare, *info["tcbLevels"]]
    data = bound(
        tee_tcb_svn=bytes([4, 1, 3]) + bytes(13),
        tee_tcb_svn2=bytes([6, 0, 3]) + bytes(13),
        version=5,
        body_type=3,
    )
    expected = policy(pins={"tcb_status": ("OutOfDate",)})
    for key in (None, machine.new_key()):
        changes = {} if key is None else {"tcb_info_key": key}
        found = codes(verify(data, (collateral(tcb_info=info, **changes),), expected=expected))
        assert "tcb_info_mismatch" in found
        assert ("tcb_info_signature_invalid" in found) == (key is not None)


def test_documents_of_two_evaluations_are_noted() -> None:
    def notes(number: int) -> list[str]:
        identity = machine.qe_identity(tcbEvaluationDataNumber=number)
        verdict = verify(documents=(collateral(qe_identity=identity),))
        verdict.require()
        return [note for note in verdict.notes if "tcbEvaluationDataNumber" in note]

    number = machine.tcb_info()["tcbEvaluationDataNumber"]
    assert notes(number) == []
    (note,) = notes(number - 1)
    assert str(number) in note and str(number - 1) in note


def test_unknown_tcb_type_is_malformed() -> None:
    verdict = verify(documents=(collateral(tcb_info=machine.tcb_info(tcbType=1)),))
    assert codes(verdict) == {"tdx_collateral_missing"}


def test_without_collateral_the_signatures_still_show() -> None:
    verdict = verify(documents=())
    assert codes(verdict) == {"tdx_collateral_missing"}
    held = {check.name for check in verdict.checks if check.failure is None}
    assert {"tdx.signature", "tdx.qe_binding", "tdx.qe_signature", "tdx.pck_chain"} <= held


def test_second_opinion_must_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    for opinion in (SecondOpinion("", "something else"), SecondOpinion("OutOfDate", "")):
        monkeypatch.setattr(tdx_collateral_rules, "ask_dcap_qvl", lambda *_, o=opinion: o)
        assert codes(verify()) == {"dcap_qvl_refused"}


RELAUNCHED: dict[str, Any] = {
    "tee_tcb_svn": bytes([4, 1, 3]) + bytes(13),
    "version": 5,
    "body_type": 3,
}


@pytest.mark.parametrize(
    ("status", "relaunched", "aged"),
    [
        ("UpToDate", "TDRelaunchAdvised", "OutOfDate"),
        (
            "ConfigurationNeeded",
            "TDRelaunchAdvisedConfigurationNeeded",
            "OutOfDateConfigurationNeeded",
        ),
    ],
)
def test_a_new_start_does_not_renew_the_quoting_enclave(
    status: str, relaunched: str, aged: str
) -> None:
    levels = [level((2, 2, 2, 2, 3, 1, 0, 5), (5, 0, 2), 11, status)]
    documents = (collateral(tcb_info=machine.tcb_info(tcbLevels=levels)),)
    expected = policy(pins={"tcb_status": (relaunched,)})
    verify(bound(**RELAUNCHED), documents, expected=expected).require()
    data = bound(**RELAUNCHED, qe_isvsvn=3)
    verdict = verify(data, documents, expected=expected)
    assert verdict.fields["tcb_status"] == aged
    assert codes(verdict) == {"pin_refused"}
    # dcap-qvl agrees.
    verify(data, documents, expected=policy(pins={"tcb_status": (aged,)})).require()


@pytest.mark.parametrize(
    ("changes", "allowed", "refused"),
    [
        ({"tdattributes": 0}, {"open": ("event_log", "sept_ve_disable")}, "sept_ve_not_disabled"),
        (
            {"mrservicetd": b"\x11" * 48, "version": 5, "body_type": 3},
            {"pins": {"mrservicetd": ("11" * 48,)}},
            "service_td_bound",
        ),
    ],
)
def test_second_opinion_is_dropped_only_for_what_the_policy_allows(
    changes: dict[str, Any], allowed: dict[str, Any], refused: str
) -> None:
    verify(bound(**changes), expected=policy(**allowed)).require()
    verdict = verify(bound(**changes))
    assert codes(verdict) == {refused, "dcap_qvl_refused"}
    with pytest.raises(AppraisalError) as first:
        verdict.require()
    assert first.value.code == refused
    # It then says no status: one that is not the best goes unconfirmed.
    old = changes | {
        "tee_tcb_svn": bytes([4, 1, 3]) + bytes(13),
        "tee_tcb_svn2": RELAUNCHED["tee_tcb_svn"],
    }
    pins = allowed.get("pins", {}) | {"tcb_status": ("OutOfDate",)}
    verdict = verify(bound(**old), expected=policy(**allowed | {"pins": pins}))
    assert verdict.fields["tcb_status"] == "OutOfDate"
    assert codes(verdict) == {"dcap_qvl_refused"}


def test_second_opinion_is_not_dropped_for_another_opened_check() -> None:
    verdict = verify(bound(tdattributes=0), expected=policy(open=("event_log", "mrservicetd")))
    assert codes(verdict) == {"sept_ve_not_disabled", "dcap_qvl_refused"}


def test_second_opinion_survives_a_panic(monkeypatch: pytest.MonkeyPatch) -> None:
    class PanicException(BaseException):
        pass

    def panic(*_: object) -> None:
        raise PanicException

    monkeypatch.setattr(dcap.dcap_qvl, "verify_with_root_ca", panic)
    assert codes(verify()) == {"dcap_qvl_refused"}


def test_second_opinion_is_really_asked() -> None:
    # dcap-qvl wants authentication data of 32 bytes, which Intel's enclave always sends; ours does
    # not care.
    assert codes(verify(bound(qe_auth=b"x" * 20))) == {"dcap_qvl_refused"}


# -- policy ----------------------------------------------------------------------------------------


def test_nothing_is_unpinned_by_silence() -> None:
    empty = Expectations("tdx", Requirements(roots=vendor().roots), ())
    verdict = verify(expected=empty, bound_to=None)
    assert codes(verdict) == {
        "pin_missing",
        "measurement_not_pinned",
        "freshness_unproven",
        "event_log_missing",
    }
    missing = {f.what for f in verdict.failures if isinstance(f, PinMissing)}
    assert missing == set(PINS["tdx"]) - {"mrservicetd"}


@pytest.mark.parametrize("pin", sorted(set(PINS["tdx"]) - {"mrservicetd"}))
def test_each_pin_may_be_opened(pin: str) -> None:
    verify(expected=policy(unpin=(pin,), open=("event_log", pin))).require()
    assert codes(verify(expected=policy(unpin=(pin,)))) == {"pin_missing"}


def test_pinned_service_td_must_be_there() -> None:
    expected = policy(pins={"mrservicetd": ("38" * 48,)})
    assert codes(verify(expected=expected)) == {"pin_refused"}
    data = bound(version=5, body_type=3, mrservicetd=b"\x39" * 48)
    assert codes(verify(data, expected=expected)) == {"pin_refused"}


@pytest.mark.parametrize("identity", ["1234abcd", "b0c06f000000", bytes(range(16)).hex()])
def test_revoked_identities(identity: str) -> None:
    assert codes(verify(expected=policy(revoked=(identity,)))) == {"revoked_identity"}


def test_certificates_of_one_platform_are_one_node() -> None:
    found = set()
    for serial in (0x11, 0x22):
        pck = vendor().pck(Platform(pcesvn=13 + serial), serial=serial)
        expected = policy(pins={"pck_serial": ("11", "22")})
        verdict = verify(bound(pck=pck), expected=expected)
        verdict.require()
        found.add(verdict.identity)
        revoked = policy(pins={"pck_serial": ("11", "22")}, revoked=(verdict.identity,))
        assert codes(verify(bound(pck=pck), expected=revoked)) == {"revoked_identity"}
    assert len(found) == 1
    other = vendor().pck(Platform(ppid=bytes(16)), serial=0x11)
    assert verify(bound(pck=other)).identity not in found


def test_freshness() -> None:
    assert codes(verify(bound_to=b"other")) == {"evidence_not_bound"}
    assert codes(verify(bound_to=None)) == {"freshness_unproven"}
    opened = policy(open=("event_log", "freshness"))
    verify(bound_to=None, expected=opened).require()
    assert codes(verify(bound_to=b"other", expected=opened)) == {"evidence_not_bound"}
    assert codes(verify(bound_to=REPORT_DATA[:32])) == {"evidence_not_bound"}
    assert codes(verify(bound_to=REPORT_DATA + b"\0")) == {"evidence_not_bound"}
    assert codes(verify(quote(), bound_to=b"")) == {"freshness_unproven"}


# -- event log -------------------------------------------------------------------------------------


def test_event_log_is_refused() -> None:
    registers = machine.replay(EVENTS)
    log = machine.event_log(EVENTS)
    data = bound(**registers)
    pins = {name: (value.hex(),) for name, value in registers.items()}

    def found(**parts: bytes) -> set[str]:
        return codes(verify(data, expected=policy(open=(), pins=pins), **parts))

    assert found(event_log=log) == set()
    assert found() == {"event_log_missing"}
    assert found(event_log=machine.event_log(EVENTS[:-1])) == {"event_log_not_replayed"}
    swapped = [EVENTS[1], EVENTS[0], *EVENTS[2:]]
    assert found(event_log=machine.event_log(swapped)) == {"event_log_not_replayed"}
    into_mrtd = [*EVENTS, (0, 4, b"x")]
    assert found(event_log=machine.event_log(into_mrtd)) == {"event_log_malformed"}
    assert found(event_log=machine.event_log([*EVENTS, (5, 4, b"x")])) == {"event_log_malformed"}
    assert found(event_log=log + b"x") == {"event_log_malformed"}
    assert found(event_log=log[:90]) == {"event_log_malformed"}
    assert found(event_log=log, event_table=machine.ccel_table(kind=1)) == {"event_log_malformed"}
    bad = bytearray(machine.ccel_table())
    bad[9] ^= 1
    assert found(event_log=log, event_table=bytes(bad)) == {"event_log_malformed"}
    assert found(event_log=log, event_table=b"CCEL") == {"event_log_malformed"}


def test_log_is_judged_without_policy() -> None:
    verdict = verify_tdx(
        {"quote": bound(), "event_log": machine.event_log(EVENTS)}, Collateral(), None, NOW, None
    )
    assert "event_log_not_replayed" in codes(verdict)


# -- the table of rules ----------------------------------------------------------------------------


def test_rules_are_named_once_and_say_their_source() -> None:
    names = [rule.name for rule in TDX_RULES]
    assert len(set(names)) == len(names)
    for rule in TDX_RULES:
        assert rule.name.startswith("tdx.")
        assert len(rule.source) > 5
        assert rule.errors


def test_every_error_is_shown_refusing() -> None:
    shown = {code for _, _, codes in (*_quote_cases(), *_collateral_cases()) for code in codes}
    # Each of these has a test of its own above.
    shown |= {
        "tdx_collateral_missing",
        "dcap_qvl_refused",
        "pin_missing",
        "measurement_not_pinned",
        "freshness_unproven",
        "revoked_identity",
        "event_log_missing",
        "event_log_malformed",
        "event_log_not_replayed",
    }
    assert shown == {error.code for rule in TDX_RULES for error in rule.errors}


@pytest.mark.parametrize("member", ["pck_crl", "root_ca_crl"])
@pytest.mark.parametrize("fault", ["issuer", "digest", "partial"])
def test_lists_that_are_not_the_issuers_own_and_whole(member: str, fault: str) -> None:
    issuer = vendor().pck_ca if member == "pck_crl" else vendor().root
    changed = {
        "issuer": lambda: machine.revocation_list(vendor().signer, key=issuer),
        "digest": lambda: machine.revocation_list(issuer, digest=hashes.SHA384()),
        "partial": lambda: machine.revocation_list(issuer, partial=True),
    }[fault]()
    found = verify(documents=(collateral(**{member: changed}),))
    wanted = "tdx_collateral_missing" if fault == "partial" else "intel_crl_signature_invalid"
    assert wanted in {failure.code for failure in found.failures}
