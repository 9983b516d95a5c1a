"""Real TD quotes get the verdict that `expected.json` states, at the dates that it states."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from functools import cache
from typing import Any

import pytest
from evidence_samples import EVIDENCE, needs_evidence

from placement.requirements import PINS, Requirements
from security.attestation.collateral import Collateral
from security.attestation.errors import NotATdQuote
from security.attestation.tdx import verify_tdx
from security.attestation.verdict import Expectations, Verdict

pytestmark = needs_evidence

UNSIGNED_EVENT_LOGS = {"v4-debug": "ccel_nonmatching.bin", "v4-gcp-cos-eventlog": "ccel_data.bin"}


@cache
def stated(sample: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((EVIDENCE / "expected.json").read_text())[f"tdx/{sample}"]
    return found


def at(date: str) -> int:
    """Noon of a day."""
    return int(datetime.fromisoformat(date).replace(hour=12, tzinfo=UTC).timestamp())


def parts(sample: str) -> dict[str, bytes]:
    folder = EVIDENCE / "tdx" / sample
    found = {"quote": (folder / "quote.bin").read_bytes()}
    if sample in UNSIGNED_EVENT_LOGS:
        found["event_log"] = (folder / UNSIGNED_EVENT_LOGS[sample]).read_bytes()
    if sample == "v4-gcp-cos-eventlog":
        found["event_table"] = (folder / "ccel_table.bin").read_bytes()
    return found


def documents(*samples: str) -> Collateral:
    paths = [EVIDENCE / "tdx" / sample / "collateral.json" for sample in samples]
    return Collateral(tdx=tuple(path.read_bytes() for path in paths if path.exists()))


def verify(
    sample: str,
    date: str,
    *,
    collateral: Collateral | None = None,
    expected: Expectations | None = None,
    bound_to: bytes | None = None,
    **changed: bytes,
) -> Verdict:
    return verify_tdx(
        parts(sample) | changed,
        documents(sample) if collateral is None else collateral,
        expected,
        at(date),
        bound_to,
    )


def codes(verdict: Verdict) -> list[str]:
    return sorted(failure.code for failure in verdict.failures)


def pinned(sample: str, **changes: Any) -> Expectations:
    """A policy that pins what the sample is."""
    fields = stated(sample)["fields"]
    pins = {name: (fields[name],) for name in PINS["tdx"] if name in fields and name != "fmspc"}
    pins |= {
        "mrsignerseam": ("00" * 48,),
        "fmspc": (fields["fmspc"].lower(),),
        "tcb_status": ("UpToDate",),
    }
    arguments: dict[str, Any] = {"open": ("event_log", "pck_serial")}
    arguments |= changes
    arguments["pins"] = pins | changes.pop("pins", {})
    return Expectations("tdx", Requirements(**arguments), (fields["mrtd"],))


SOUND = [
    ("v4-uptodate", "2025-06-20", "UpToDate"),
    ("v4-uptodate", "2025-07-18", "UpToDate"),
    ("v5-uptodate", "2026-02-19", "UpToDate"),
    ("v5-uptodate", "2026-03-02", "UpToDate"),
    ("v4-outofdate", "2025-10-29", "OutOfDate"),
    ("v4-outofdate", "2025-11-25", "OutOfDate"),
]
UNSOUND = [
    ("v4-uptodate", "2025-06-18", ["qe_identity_from_future", "tcb_info_from_future"]),
    ("v4-uptodate", "2025-07-20", ["intel_crl_expired", "qe_identity_expired", "tcb_info_expired"]),
    (
        "v4-uptodate",
        "2026-11-23",
        ["intel_crl_expired", "intel_crl_expired", "qe_identity_expired", "tcb_info_expired"],
    ),
    (
        "v5-uptodate",
        "2026-01-26",
        ["pck_chain_expired", "qe_identity_from_future", "tcb_info_from_future"],
    ),
    ("v5-uptodate", "2026-03-04", ["tcb_info_expired"]),
    ("v5-no-tcb-level", "2026-02-19", ["tcb_level_unmatched"]),
    ("v5-no-tcb-level", "2026-03-19", ["tcb_level_unmatched"]),
    ("v4-debug", "2023-06-20", ["event_log_not_replayed", "td_debug"]),
    ("v4-debug", "2023-07-07", ["event_log_not_replayed", "td_debug"]),
    ("v4-spr-e4", "2023-06-20", ["quote_trailing_bytes", "tcb_level_unmatched"]),
    ("v5-service-td", "2026-02-20", ["tdx_collateral_missing"]),
    ("v4-gcp-cos-eventlog", "2025-06-20", ["tdx_collateral_missing"]),
]


@pytest.mark.parametrize(("sample", "date", "status"), SOUND)
def test_sound_samples(sample: str, date: str, status: str) -> None:
    assert date in stated(sample)["as_of"]
    verdict = verify(sample, date)
    verdict.require()
    assert verdict.fields["tcb_status"] == status
    assert "tdx.dcap_qvl" in {check.name for check in verdict.checks}


@pytest.mark.parametrize(("sample", "date", "expected"), UNSOUND)
def test_unsound_samples(sample: str, date: str, expected: list[str]) -> None:
    assert codes(verify(sample, date)) == expected


def test_every_sample_has_a_test() -> None:
    tested = {sample for sample, _, _ in (*SOUND, *UNSOUND)} | {"sgx-not-tdx", "azure-vtpm"}
    assert tested == {path.name for path in (EVIDENCE / "tdx").iterdir() if path.is_dir()}


@pytest.mark.parametrize("sample", sorted({s for s, _, _ in (*SOUND, *UNSOUND)}))
def test_fields_are_read(sample: str) -> None:
    verdict = verify(sample, "2025-06-20")
    fields = stated(sample)["fields"]
    for name, value in fields.items():
        if isinstance(value, str) and name != "pck_ca":
            assert verdict.fields[name] == value.lower(), name
    assert verdict.fields["version"] == str(fields["version"])
    assert fields["pck_ca"] in verdict.fields["pck_ca"].lower()
    assert verdict.measurement == fields["mrtd"]
    debug = any(failure.code == "td_debug" for failure in verdict.failures)
    assert debug == fields["debug"]


def test_sgx_is_no_td() -> None:
    with pytest.raises(NotATdQuote):
        verify("sgx-not-tdx", "2025-06-20")


def test_pinned_sample_holds() -> None:
    report_data = bytes.fromhex(stated("v5-uptodate")["fields"]["report_data"])
    expected = pinned("v5-uptodate")
    verify("v5-uptodate", "2026-02-19", expected=expected, bound_to=report_data).require()
    verdict = verify("v5-uptodate", "2026-02-19", expected=expected, bound_to=b"live challenge")
    assert codes(verdict) == ["evidence_not_bound"]
    verdict = verify("v5-uptodate", "2026-02-19", expected=expected)
    assert codes(verdict) == ["freshness_unproven"]


def test_out_of_date_is_refused_by_a_strict_policy() -> None:
    report_data = bytes.fromhex(stated("v4-outofdate")["fields"]["report_data"])
    for pins, expected in (({}, ["pin_refused"]), ({"tcb_status": ("OutOfDate",)}, [])):
        found = verify(
            "v4-outofdate",
            "2025-10-29",
            expected=pinned("v4-outofdate", pins=pins),
            bound_to=report_data,
        )
        assert codes(found) == expected


def test_service_td_is_refused_unless_pinned() -> None:
    fields = stated("v5-service-td")["fields"]
    base = pinned("v5-service-td")
    pins = {name: value for name, value in base.requirements.pins.items() if name != "mrservicetd"}
    unpinned = Expectations(
        "tdx", Requirements(pins=pins, open=base.requirements.open), base.measurements
    )
    report_data = bytes.fromhex(fields["report_data"])
    # There is collateral for this FMSPC in another sample, but this platform is behind all levels.
    collateral = documents("v4-uptodate", "v5-uptodate")
    found = verify(
        "v5-service-td",
        "2026-02-20",
        collateral=collateral,
        expected=unpinned,
        bound_to=report_data,
    )
    assert codes(found) == ["service_td_bound", "tcb_level_unmatched"]
    found = verify(
        "v5-service-td", "2026-02-20", collateral=collateral, expected=base, bound_to=report_data
    )
    assert codes(found) == ["tcb_level_unmatched"]


def test_event_log_replays() -> None:
    verdict = verify("v4-gcp-cos-eventlog", "2025-06-20")
    checks = {check.name: check.failure for check in verdict.checks}
    assert checks["tdx.event_log"] is None
    assert checks["tdx.event_table"] is None
    assert verdict.fields["event_log_events"] == "43"
    for name in ("tdx.signature", "tdx.qe_binding", "tdx.qe_signature", "tdx.pck_chain"):
        assert checks[name] is None
    log = bytearray(parts("v4-gcp-cos-eventlog")["event_log"])
    log[200] ^= 1
    found = verify("v4-gcp-cos-eventlog", "2025-06-20", event_log=bytes(log))
    assert {"event_log_not_replayed", "event_log_malformed"} & set(codes(found))


def test_collateral_of_other_platforms() -> None:
    found = verify("v4-uptodate", "2025-06-20", collateral=documents("v5-uptodate", "v4-debug"))
    assert codes(found) == ["fmspc_mismatch"]


def test_right_collateral_is_found_among_several() -> None:
    collateral = documents("v4-debug", "v5-uptodate", "v4-outofdate", "v4-uptodate", "sgx-not-tdx")
    verify("v4-uptodate", "2025-06-20", collateral=collateral).require()
    verify("v5-uptodate", "2026-02-19", collateral=collateral).require()


@pytest.mark.parametrize(
    ("offset", "code"),
    [
        (48 + 136, "quote_signature_invalid"),
        (48 + 520, "quote_signature_invalid"),
        (48 + 328, "quote_signature_invalid"),
        (48 + 120, "quote_signature_invalid"),
        (168, "quote_signature_invalid"),
        (184, "quote_signature_invalid"),
        (568, "quote_signature_invalid"),
        (700, "qe_binding_invalid"),
        (1000, "qe_signature_invalid"),
    ],
)
def test_flipped_bytes(offset: int, code: str) -> None:
    quote = bytearray(parts("v4-uptodate")["quote"])
    quote[offset] ^= 1
    assert code in codes(verify("v4-uptodate", "2025-06-20", quote=bytes(quote)))


def test_flipped_padding_is_no_padding() -> None:
    quote = bytearray(parts("v4-uptodate")["quote"])
    quote[-1] ^= 1
    found = verify("v4-uptodate", "2025-06-20", quote=bytes(quote))
    assert codes(found) == ["quote_trailing_bytes"]
    verify("v4-uptodate", "2025-06-20", quote=bytes(quote[:-70])).require()


def test_local_deny_list() -> None:
    verdict = verify("v5-uptodate", "2026-02-19")
    for identity in (verdict.identity, verdict.fields["fmspc"]):
        expected = pinned(
            "v5-uptodate", revoked=(identity,), open=("event_log", "pck_serial", "freshness")
        )
        found = verify("v5-uptodate", "2026-02-19", expected=expected)
        assert codes(found) == ["revoked_identity"]


def test_tampered_collateral() -> None:
    document = json.loads((EVIDENCE / "tdx" / "v4-outofdate" / "collateral.json").read_text())
    document["tcb_info"] = document["tcb_info"].replace("OutOfDate", "UpToDate")
    collateral = Collateral(tdx=(json.dumps(document).encode(),))
    found = verify("v4-outofdate", "2025-10-29", collateral=collateral)
    assert codes(found) == ["tcb_info_signature_invalid"]
