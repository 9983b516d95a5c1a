"""Every sample of real evidence through the command line: verdict, exit code, reasons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from attest_runs import Answer, attest
from evidence_samples import EVIDENCE, needs_evidence
from pinning import policy_for

pytestmark = needs_evidence
Capture = pytest.CaptureFixture[str]

ACCEPTED, REFUSED, SOUND = 0, 1, 3

UNPINNED: list[tuple[str, str, int, set[str]]] = [
    ("snp/milan-debug", "2025-06-10", REFUSED, {"snp_debug_allowed"}),
    ("snp/milan-azure-2023", "2023-02-01", SOUND, set()),
    ("snp/milan-azure-2023", "2030-01-23", SOUND, set()),
    ("snp/milan-azure-2023", "2023-01-01", REFUSED, {"snp_certificate_not_yet_valid"}),
    ("snp/milan-azure-2023", "2030-02-01", REFUSED, {"snp_certificate_expired"}),
    ("snp/milan-vlek-aws-vmpl1", "2025-06-10", SOUND, set()),
    ("snp/milan-vlek-aws-vmpl1", "2026-11-23", REFUSED, {"snp_certificate_expired"}),
    ("snp/genoa-azure-vtpm", "2026-11-23", SOUND, set()),
    ("snp/milan-azure-vtpm", "2026-11-23", SOUND, set()),
    ("snp/genoa-tinfoil", "2026-11-23", REFUSED, {"snp_endorsement_missing"}),
    ("snp/turin-vcek-only", "2026-11-23", SOUND, set()),
    ("tdx/v4-uptodate", "2025-06-20", SOUND, set()),
    ("tdx/v4-uptodate", "2025-07-18", SOUND, set()),
    (
        "tdx/v4-uptodate",
        "2025-06-18",
        REFUSED,
        {"tcb_info_from_future", "qe_identity_from_future"},
    ),
    (
        "tdx/v4-uptodate",
        "2025-07-20",
        REFUSED,
        {"tcb_info_expired", "qe_identity_expired", "intel_crl_expired"},
    ),
    (
        "tdx/v4-uptodate",
        "2026-11-23",
        REFUSED,
        {"tcb_info_expired", "qe_identity_expired", "intel_crl_expired"},
    ),
    ("tdx/v5-no-tcb-level", "2026-02-19", REFUSED, {"tcb_level_unmatched"}),
    ("tdx/v5-no-tcb-level", "2026-03-19", REFUSED, {"tcb_level_unmatched"}),
    ("tdx/v4-debug", "2023-06-20", REFUSED, {"td_debug"}),
    ("tdx/v4-debug", "2023-07-07", REFUSED, {"td_debug"}),
    ("tdx/v4-spr-e4", "2023-06-20", REFUSED, {"quote_trailing_bytes", "tcb_level_unmatched"}),
    ("tdx/v5-service-td", "2026-02-19", REFUSED, {"tdx_collateral_missing"}),
    ("tdx/v5-uptodate", "2026-02-19", SOUND, set()),
    ("tdx/v5-uptodate", "2026-03-02", SOUND, set()),
    (
        "tdx/v5-uptodate",
        "2026-01-26",
        REFUSED,
        {"pck_chain_expired", "tcb_info_from_future", "qe_identity_from_future"},
    ),
    ("tdx/v5-uptodate", "2026-03-04", REFUSED, {"tcb_info_expired"}),
    ("tdx/v4-outofdate", "2025-10-29", SOUND, set()),
    ("tdx/v4-outofdate", "2025-11-25", SOUND, set()),
    ("tdx/v4-gcp-cos-eventlog", "2025-06-10", REFUSED, {"tdx_collateral_missing"}),
    ("tdx/azure-vtpm", "2025-06-10", REFUSED, {"tdx_collateral_missing"}),
    ("tdx/sgx-not-tdx", "2025-06-20", REFUSED, {"not_a_td_quote"}),
    ("nvidia/hopper-550.90.07", "2025-06-10", SOUND, set()),
    ("nvidia/hopper-535.86.09", "2024-06-10", SOUND, set()),
    (
        "nvidia/hopper-bad-signature",
        "2025-06-10",
        REFUSED,
        {
            "nvidia_report_signature_invalid",
            "nvidia_fwid_mismatch",
            "nvidia_topology_mismatch",
        },
    ),
    ("nvidia/hopper-570.124.03", "2025-06-10", REFUSED, {"rim_unusable"}),
    ("nvidia/hopper-cert-hold", "2025-06-10", SOUND, set()),
    ("nvidia/ppcie-8gpu-4switch", "2025-06-10", SOUND, set()),
]


@pytest.mark.parametrize(
    ("sample", "at", "code", "reasons"),
    UNPINNED,
    ids=[f"{sample}-{at}" for sample, at, _, _ in UNPINNED],
)
def test_without_a_policy(
    capsys: Capture, sample: str, at: str, code: int, reasons: set[str]
) -> None:
    answer = attest(capsys, EVIDENCE / sample, "--at", at)
    assert answer.failures == reasons
    assert answer.code == code == answer.document["exit"]
    assert answer.document["verdict"] == {REFUSED: "refused", SOUND: "sound"}[code]


def test_every_sample_is_here() -> None:
    expected = json.loads((EVIDENCE / "expected.json").read_text())
    assert {"/".join(name.split("/")[:2]) for name in expected} == {name for name, *_ in UNPINNED}


@pytest.mark.parametrize("sample", ["tdx/v4-gcp-cos-eventlog", "tdx/v5-service-td"])
def test_signature_and_chain_without_collateral(capsys: Capture, sample: str) -> None:
    """What can be judged is shown as good; what is missing refuses."""
    answer = attest(capsys, EVIDENCE / sample, "--at", "2025-06-10")
    refused = [item["name"] for item in answer.document["checks"] if not item["ok"]]
    assert len(refused) == 1
    good = {item["name"] for item in answer.document["checks"] if item["ok"]}
    assert any("signature" in name for name in good)
    assert any("chain" in name for name in good)


# -- under a policy --------------------------------------------------------------------------------


def _nonce(sample: str, answer: Answer) -> str:
    expected: dict[str, Any] = json.loads((EVIDENCE / "expected.json").read_text())
    entry = expected.get(sample) or expected.get(f"{sample}/gpu[0]")
    assert entry is not None
    if "vtpm" in entry:
        return str(entry["vtpm"]["tpm_extra_data"])
    nonce = str(entry["fields"].get("request_nonce") or entry["fields"]["report_data"])
    # Report data of zeros answers no challenge, and zeros are none.
    return nonce if nonce.strip("0") else "ab" * 32


def _under(
    capsys: Capture,
    tmp_path: Path,
    sample: str,
    at: str,
    *options: object,
    nonce: str = "",
    changes: dict[str, Any] | None = None,
    measurement: str | None = None,
) -> Answer:
    shown = attest(capsys, EVIDENCE / sample, "--at", at)
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_for(shown.document, changes, measurement))
    nonce = nonce or _nonce(sample, shown)
    options = ("--policy", policy, "--nonce", nonce, *options)
    return attest(capsys, EVIDENCE / sample, "--at", at, *options)


PINNED = [
    ("snp/milan-azure-2023", "2025-06-10", {}),
    ("snp/milan-vlek-aws-vmpl1", "2025-06-10", {}),
    ("snp/genoa-azure-vtpm", "2025-06-10", {}),
    ("snp/milan-azure-vtpm", "2025-06-10", {}),
    ("tdx/v4-uptodate", "2025-06-20", {}),
    ("tdx/v4-uptodate", "2025-07-18", {}),
    ("tdx/v5-uptodate", "2026-02-19", {}),
    ("tdx/v5-uptodate", "2026-03-02", {}),
    ("tdx/v4-outofdate", "2025-10-29", {}),
    ("nvidia/hopper-550.90.07", "2025-06-10", {}),
    ("nvidia/hopper-535.86.09", "2024-06-10", {"open": ["revocation", "fwid", "driver_rim"]}),
    ("nvidia/ppcie-8gpu-4switch", "2025-06-10", {}),
]


@pytest.mark.parametrize(
    ("sample", "at", "changes"), PINNED, ids=[f"{s}-{a}" for s, a, _ in PINNED]
)
def test_exactly_pinned(
    capsys: Capture, tmp_path: Path, sample: str, at: str, changes: dict[str, Any]
) -> None:
    answer = _under(capsys, tmp_path, sample, at, changes=changes)
    assert answer.failures == set()
    assert answer.code == ACCEPTED
    assert answer.document["verdict"] == "accepted"


@pytest.mark.parametrize(
    ("sample", "at", "changes"), PINNED, ids=[f"{s}-{a}" for s, a, _ in PINNED]
)
def test_recorded_evidence_is_not_fresh(
    capsys: Capture, tmp_path: Path, sample: str, at: str, changes: dict[str, Any]
) -> None:
    """The same under the same policy, for another challenge: refused for that alone."""
    answer = _under(capsys, tmp_path, sample, at, nonce="ab" * 32, changes=changes)
    assert answer.code == REFUSED
    assert answer.failures <= {"evidence_not_bound", "nvidia_nonce_mismatch"}


def test_no_nonce(capsys: Capture, tmp_path: Path) -> None:
    sample = EVIDENCE / "snp" / "milan-azure-2023"
    shown = attest(capsys, sample, "--at", "2025-06-10")
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_for(shown.document))
    answer = attest(capsys, sample, "--at", "2025-06-10", "--policy", policy)
    assert (answer.code, answer.failures) == (REFUSED, {"freshness_unproven"})
    policy.write_text(policy_for(shown.document, {"open": ["revocation", "csp_id", "freshness"]}))
    answer = attest(capsys, sample, "--at", "2025-06-10", "--policy", policy)
    assert (answer.code, answer.failures) == (ACCEPTED, set())


GPU_ALONE = {"rim_missing", "nvidia_revocation_unknown"}
STRICT: list[tuple[str, str, dict[str, Any], set[str]]] = [
    ("snp/milan-vlek-aws-vmpl1", "2025-06-10", {"vmpl": ["0"]}, {"pin_refused"}),
    ("snp/milan-vlek-aws-vmpl1", "2025-06-10", {"signing_key": ["VCEK"]}, {"pin_refused"}),
    ("snp/milan-vlek-aws-vmpl1", "2025-06-10", {"csp_id": ["CN=other"]}, {"pin_refused"}),
    ("tdx/v4-outofdate", "2025-10-29", {"tcb_status": ["UpToDate"]}, {"pin_refused"}),
    (
        "tdx/v5-service-td",
        "2026-02-19",
        {"mrservicetd": ["0" * 96]},
        {"pin_refused", "tdx_collateral_missing"},
    ),
    (
        "tdx/v4-gcp-cos-eventlog",
        "2025-06-10",
        {},
        {"tdx_collateral_missing", "evidence_not_bound"},
    ),
    ("snp/milan-azure-2023", "2025-06-10", {"host_data": None}, {"pin_missing"}),
    (
        "snp/milan-azure-2023",
        "2026-11-23",
        {"open": ["csp_id"]},
        {"snp_revocation_unknown"},
    ),
    (
        "nvidia/hopper-cert-hold",
        "2025-06-10",
        {"revoked": ["5266186e8f8b58751642532e696b02c086098ce5"]},
        {"revoked_identity"},
    ),
    ("nvidia/hopper-550.90.07", "2025-06-10", {"open": ["fwid"]}, GPU_ALONE),
    ("nvidia/ppcie-8gpu-4switch", "2025-06-10", {"gpus": ["4"]}, {"pin_refused"}),
]


@pytest.mark.parametrize(("sample", "at", "changes", "reasons"), STRICT)
def test_strict(
    capsys: Capture,
    tmp_path: Path,
    sample: str,
    at: str,
    changes: dict[str, Any],
    reasons: set[str],
) -> None:
    answer = _under(capsys, tmp_path, sample, at, changes=changes)
    assert answer.code == REFUSED
    assert answer.failures == reasons


def test_measurement(capsys: Capture, tmp_path: Path) -> None:
    answer = _under(capsys, tmp_path, "snp/milan-azure-2023", "2025-06-10", measurement="ab" * 48)
    assert (answer.code, answer.failures) == (REFUSED, {"measurement_refused"})


def test_policy_of_another_kind(capsys: Capture, tmp_path: Path) -> None:
    shown = attest(capsys, EVIDENCE / "snp" / "milan-azure-2023", "--at", "2025-06-10")
    policy = tmp_path / "policy.yaml"
    policy.write_text(policy_for(shown.document))
    answer = attest(
        capsys, EVIDENCE / "tdx" / "v4-uptodate", "--at", "2025-06-20", "--policy", policy
    )
    assert answer.code == REFUSED
    assert "evidence_kind_refused" in answer.failures
    for alone in ("nvidia/hopper-550.90.07", "snp/turin-vcek-only"):
        answer = attest(capsys, EVIDENCE / alone, "--at", "2025-06-10", "--policy", policy)
        assert answer.code == REFUSED
        assert {"evidence_kind_refused", "machine_evidence_missing"} <= answer.failures


# -- files given by hand ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bad-vcek-legacy.der", "bad-vcek-new.der"])
def test_bad_vcek(capsys: Capture, name: str) -> None:
    sample = EVIDENCE / "snp" / "milan-azure-2023"
    answer = attest(capsys, sample, "--at", "2025-06-10", "--vcek", sample / name)
    assert answer.code == REFUSED
    assert "snp_report_signature_invalid" in answer.failures


@pytest.mark.parametrize("case", [2, 3, 4])
def test_partial_chain(capsys: Capture, case: int) -> None:
    sample = EVIDENCE / "nvidia" / "hopper-550.90.07"
    chain = sample / f"bad_or_partial_chain_case{case}.pem"
    answer = attest(capsys, sample, "--at", "2025-06-10", "--chain", chain)
    assert answer.code == REFUSED


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("vbios_rim_mismatch.xml", "rim_mismatch"),
        ("driver_rim_bad_digest.xml", "rim_unusable"),
    ],
)
def test_bad_manifest(capsys: Capture, name: str, reason: str) -> None:
    sample = EVIDENCE / "nvidia" / "hopper-535.86.09"
    answer = attest(capsys, sample, "--at", "2024-06-10", "--rim", sample / name)
    assert (answer.code, answer.failures) == (REFUSED, {reason})


def test_log_of_another_machine(capsys: Capture) -> None:
    sample = EVIDENCE / "tdx" / "v4-debug"
    log = sample / "ccel_nonmatching.bin"
    answer = attest(capsys, sample, "--at", "2023-06-20", "--event-log", log)
    assert (answer.code, answer.failures) == (REFUSED, {"td_debug", "event_log_not_replayed"})


def test_files_without_a_directory(capsys: Capture) -> None:
    sample = EVIDENCE / "snp" / "milan-azure-2023"
    answer = attest(
        capsys,
        *("--report", sample / "report.bin", "--vcek", sample / "vcek.der"),
        *("--collateral", EVIDENCE / "snp" / "roots", "--at", "2025-06-10"),
    )
    assert (answer.code, answer.failures) == (SOUND, set())
    sample = EVIDENCE / "nvidia" / "hopper-550.90.07"
    answer = attest(
        capsys,
        *("--report", sample / "report.hex", "--chain", sample / "chain.pem"),
        *("--at", "2025-06-10"),
    )
    assert (answer.code, answer.failures) == (SOUND, set())


def test_notes_name_what_was_left_out(capsys: Capture) -> None:
    answer = attest(capsys, EVIDENCE / "snp" / "milan-azure-2023", "--at", "2025-06-10")
    notes = " ".join(answer.document["notes"])
    assert "bad-vcek-legacy.der" in notes
    assert "bad-vcek-new.der" in notes
