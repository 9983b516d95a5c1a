"""`bulkhead attest`: exit codes, files that are not what they should be, collect and check."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import nvidia_machine
import pytest
from attest_runs import attest
from hardware_lab import policy_text, snp_kernel, write_collateral
from hypothesis import given, settings
from hypothesis import strategies as st
from nvml_stand_in import NvmlStandIn
from snp_machine import NOW, SnpMachine
from tsm_mount import mounted, needs_mount

from security.attestation import document_files
from security.attestation.evidence import composite_report_data, encode_parts, gpu_nonce
from security.attestation.inspection import inspect_document
from security.attestation.nvml import collect_gpus
from security.errors import AppraisalError
from serving import attest as command
from serving import cli

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
MACHINE = SnpMachine(product="Genoa")
NONCE = bytes(range(1, 33))
REPORT = MACHINE.report()
GPUS = nvidia_machine.machine(2, 0).devices


def write_machine(path: Path, report_data: bytes = NONCE) -> Path:
    path.mkdir()
    parts = replace(MACHINE, report_data=report_data).parts()
    for name, content in parts.items():
        (path / f"{name}.bin").write_bytes(content)
    return path


@pytest.fixture
def evidence(tmp_path: Path) -> Path:
    write_collateral(tmp_path / "roots", MACHINE.collateral())
    return write_machine(tmp_path / "evidence")


@pytest.fixture
def policy(tmp_path: Path) -> Path:
    path = tmp_path / "policy.yaml"
    path.write_text(policy_text(MACHINE))
    return path


def test_accepted(capsys: Capture, evidence: Path, policy: Path) -> None:
    answer = attest(capsys, evidence, "--at", NOW, "--policy", policy, "--nonce", NONCE.hex())
    assert (answer.code, answer.failures) == (0, set())
    assert set(answer.document) == {
        *("verdict", "exit", "at", "kind", "product", "measurement", "identity", "fields"),
        *("checks", "notes", "devices"),
    }
    assert answer.document["at"] == NOW
    assert answer.document["measurement"] == MACHINE.measurement.hex()
    assert set(answer.document["checks"][0]) == {"name", "source", "ok", "judged", "code", "reason"}


def test_throw_away_root_without_a_policy(capsys: Capture, evidence: Path) -> None:
    """Only a policy can put another root in the place of the vendor's."""
    answer = attest(capsys, evidence, "--at", NOW)
    assert (answer.code, answer.failures) == (1, {"snp_root_not_trusted"})


def test_wrong_nonce(capsys: Capture, evidence: Path, policy: Path) -> None:
    answer = attest(capsys, evidence, "--at", NOW, "--policy", policy, "--nonce", "ab" * 32)
    assert (answer.code, answer.failures) == (1, {"evidence_not_bound"})


def test_for_people(capsys: Capture, evidence: Path, policy: Path) -> None:
    arguments = ["attest", "check", str(evidence), "--at", str(NOW), "--policy", str(policy)]
    assert cli.run([*arguments, "--nonce", NONCE.hex()]) == 0
    assert "accepted under the policy" in capsys.readouterr().out
    assert cli.run(arguments) == 1
    printed = capsys.readouterr().out
    assert "refused" in printed
    assert "freshness_unproven" in printed
    assert MACHINE.measurement.hex() in printed


# -- unusable input: exit code 2 -------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("absent",),
        ("empty",),
        ("evidence", "--policy", "absent.yaml"),
        ("evidence", "--policy", "bad.yaml"),
        ("evidence", "--at", "yesterday"),
        ("evidence", "--at", "99999999999999"),
        ("evidence", "--nonce", "xy"),
        ("evidence", "--nonce", "00" * 32),
        ("evidence", "--nonce", "ab" * 65),
        ("evidence", "--collateral", "absent"),
        ("evidence", "--vcek", "absent"),
        (),
    ],
)
def test_unusable(
    capsys: Capture,
    evidence: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.yaml").write_text("version: 1\nname: [")
    answer = attest(capsys, *arguments)
    assert answer.code == 2
    assert answer.document == {}
    assert answer.errors


def test_two_machines(capsys: Capture, evidence: Path) -> None:
    (evidence / "quote.bin").write_bytes(b"quote")
    assert attest(capsys, evidence).code == 2


def test_link_out_of_the_directory(capsys: Capture, evidence: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").write_bytes((evidence / "report.bin").read_bytes())
    (evidence / "report.bin").unlink()
    (evidence / "report.bin").symlink_to(tmp_path / "elsewhere")
    answer = attest(capsys, evidence, "--at", NOW)
    assert answer.code == 2
    assert "link" in answer.errors
    (evidence / "report.bin").unlink()
    (evidence / "inside.bin").write_bytes((tmp_path / "elsewhere").read_bytes())
    (evidence / "report.bin").symlink_to(evidence / "inside.bin")
    assert attest(capsys, evidence, "--at", NOW).code == 1


def test_pipe_and_huge_file(capsys: Capture, evidence: Path, tmp_path: Path) -> None:
    answer = attest(capsys, evidence, "--vcek", "/dev/zero")
    assert answer.code == 2
    os.mkfifo(tmp_path / "pipe")
    assert attest(capsys, evidence, "--vcek", tmp_path / "pipe").code == 2
    with (evidence / "certificates.bin").open("wb") as file:
        file.truncate(document_files.MAX_FILE_BYTES + 1)
    assert attest(capsys, evidence).code == 2


def test_many_files(capsys: Capture, evidence: Path) -> None:
    for number in range(document_files.MAX_FILES):
        (evidence / f"{number}").touch()
    answer = attest(capsys, evidence)
    assert answer.code == 2
    assert "at most" in answer.errors


# -- malformed evidence: refused -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("report.bin", b""),
        ("report.bin", bytes(100)),
        ("report.bin", b"\xff" * 1184),
        ("report.bin", b"\x03" + bytes(5000)),
        ("quote.bin", b"\x04\0\2\0\x81\0\0\0" + b"\xff" * 700),
        ("evidence.json", b"{}"),
        ("evidence.json", b'{"version": 1, "hcl_report": "' + b"A" * 9 + b'"}'),
        ("evidence.json", b"[" * 5000),
        ("gpu_evidence.json", b"[]"),
        ("report.hex", b"zz"),
        ("hopper_detached_eat.json", b"[]"),
    ],
)
def test_malformed(capsys: Capture, tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / "evidence").mkdir()
    (tmp_path / "evidence" / name).write_bytes(content)
    answer = attest(capsys, tmp_path / "evidence", "--at", NOW)
    assert answer.code in ((1, 2) if name == "gpu_evidence.json" else (1,))


def test_lone_vcek(capsys: Capture, tmp_path: Path, policy: Path) -> None:
    write_collateral(tmp_path / "roots", MACHINE.collateral())
    (tmp_path / "alone").mkdir()
    (tmp_path / "alone" / "vcek.der").write_bytes(MACHINE.endorsement())
    answer = attest(capsys, tmp_path / "alone", "--at", NOW, "--policy", policy)
    assert answer.code == 1
    assert {"evidence_kind_refused", "machine_evidence_missing"} <= answer.failures


# -- machine and devices ---------------------------------------------------------------------------


@pytest.fixture
def composite(tmp_path: Path) -> Path:
    devices = collect_gpus(gpu_nonce(NONCE), NvmlStandIn(GPUS))
    data = composite_report_data(NONCE, encode_parts(devices))
    path = write_machine(tmp_path / "composite", data)
    for name, content in devices.items():
        suffix = "pem" if name.endswith("chain") else "bin"
        (path / f"{name}.{suffix}").write_bytes(content)
    known = MACHINE.collateral().with_more(nvidia_machine.collateral())
    write_collateral(tmp_path / "known", known)
    (tmp_path / "both.yaml").write_text(policy_text(MACHINE, GPUS))
    return path


def judged(capsys: Capture, path: Path, nonce: bytes = NONCE) -> tuple[int, set[str]]:
    answer = attest(
        capsys,
        *(path, "--at", NOW, "--nonce", nonce.hex()),
        *("--policy", path.parent / "both.yaml", "--collateral", path.parent / "known"),
    )
    return answer.code, answer.failures


def test_composite(capsys: Capture, composite: Path) -> None:
    assert judged(capsys, composite) == (0, set())
    wrong = {"evidence_not_bound", "nvidia_nonce_mismatch"}
    assert judged(capsys, composite, b"other") == (1, wrong)


def test_devices_of_another_machine(capsys: Capture, composite: Path) -> None:
    """The same GPUs over the same nonce, but another answer than the one that is bound."""
    for name, content in collect_gpus(gpu_nonce(NONCE), NvmlStandIn(GPUS)).items():
        if name.endswith("report"):
            (composite / f"{name}.bin").write_bytes(content)
    assert judged(capsys, composite) == (1, {"evidence_not_bound"})


def test_devices_missing(capsys: Capture, composite: Path) -> None:
    for path in composite.glob("gpu.*"):
        path.unlink()
    assert judged(capsys, composite) == (1, {"device_evidence_missing", "evidence_not_bound"})


def test_machine_missing(capsys: Capture, composite: Path) -> None:
    (composite / "report.bin").unlink()
    (composite / "certificates.bin").unlink()
    code, failures = judged(capsys, composite)
    assert code == 1
    assert "machine_evidence_missing" in failures


# -- collect ---------------------------------------------------------------------------------------


def run_bulkhead(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "serving.cli", "attest", *map(str, arguments)],
        cwd=ROOT,
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


@needs_mount
def test_collect_and_check(tmp_path: Path, policy: Path) -> None:
    """Both as processes of their own, against a mounted kernel."""
    write_collateral(tmp_path / "roots", MACHINE.collateral())
    out = tmp_path / "out"
    with mounted(snp_kernel(MACHINE), tmp_path / "tsm") as reports:
        collected = run_bulkhead("collect", out, "--nonce", NONCE.hex(), "--configfs", reports)
        assert collected.returncode == 0, collected.stderr
        again = run_bulkhead("collect", out, "--nonce", NONCE.hex(), "--configfs", reports)
        assert again.returncode == 2
        service = ("--service-provider", "svsm", "--configfs", reports)
        refused = run_bulkhead("collect", tmp_path / "b", "--nonce", NONCE.hex(), *service)
        assert refused.returncode == 1
        assert "tsm_service_provider_refused" in refused.stderr
    assert sorted(path.name for path in out.iterdir()) == ["certificates.bin", "report.bin"]
    options = ("--policy", policy, "--at", NOW, "--json")
    good = run_bulkhead("check", out, "--nonce", NONCE.hex(), *options)
    assert good.returncode == 0, good.stderr
    assert json.loads(good.stdout)["verdict"] == "accepted"
    stale = run_bulkhead("check", out, "--nonce", "ab" * 32, *options)
    assert stale.returncode == 1


@needs_mount
def test_collect_with_gpus(
    capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, composite: Path
) -> None:
    monkeypatch.setattr(
        command, "collect_gpus", lambda nonce: collect_gpus(nonce, NvmlStandIn(GPUS))
    )
    out = tmp_path / "out"
    with mounted(snp_kernel(MACHINE), tmp_path / "tsm") as reports:
        options = ["--nonce", NONCE.hex(), "--configfs", str(reports), "--gpus"]
        assert cli.run(["attest", "collect", str(out), *options]) == 0
    assert judged(capsys, out) == (0, set())


def test_collect_without_configfs(tmp_path: Path) -> None:
    options = ("--nonce", NONCE.hex(), "--configfs", tmp_path / "absent")
    failed = run_bulkhead("collect", tmp_path / "out", *options)
    assert failed.returncode == 1
    assert "tsm_unavailable" in failed.stderr
    assert not (tmp_path / "out").exists()


# -- inspect ---------------------------------------------------------------------------------------


def test_inspect(capsys: Capture, evidence: Path, tmp_path: Path) -> None:
    assert cli.run(["attest", "inspect", str(evidence / "report.bin")]) == 0
    printed = capsys.readouterr().out
    assert MACHINE.measurement.hex() in printed
    assert "nothing of this was verified" in printed
    assert cli.run(["attest", "inspect", str(evidence / "certificates.bin"), "--json"]) == 0
    sections = json.loads(capsys.readouterr().out)
    assert "AMD hwID" in sections[1]["fields"]
    (tmp_path / "other").write_bytes(b"something else")
    assert cli.run(["attest", "inspect", str(tmp_path / "other")]) == 1
    assert cli.run(["attest", "inspect", str(tmp_path / "absent")]) == 2


# -- values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("1750000000", 1750000000),
        ("2025-06-15", 1749945600),
        ("2025-06-15T12:00:00", 1749988800),
        ("2025-06-15T12:00:00Z", 1749988800),
        ("2025-06-15T14:00:00+02:00", 1749988800),
    ],
)
def test_times(text: str, seconds: int) -> None:
    assert command.parse_time(text) == seconds


def test_escapes_do_not_reach_the_terminal(capsys: Capture, tmp_path: Path) -> None:
    path = tmp_path / "token_detached_eat.json"
    path.write_text('[["JWT", "\\u001b[31mred"], {}]')
    cli.run(["attest", "check", str(tmp_path)])
    assert "\x1b[31m" not in capsys.readouterr().out


def test_given_certificate_replaces_the_table(
    capsys: Capture, evidence: Path, policy: Path, tmp_path: Path
) -> None:
    """The good certificate in the host's table does not hide the one that was named."""
    (tmp_path / "other.der").write_bytes(SnpMachine(product="Milan").endorsement())
    answer = attest(capsys, evidence, "--at", NOW, "--vcek", tmp_path / "other.der")
    assert answer.code == 1
    assert "snp_product_mismatch" in answer.failures


_BEGINNINGS = [
    b"HCLA",
    b"BHEV1",
    b"CCEL",
    b"\xffTCG",
    b"\x11\xe0\x01\xff",
    b"\x30\x82",
    b"-----BEGIN CERTIFICATE-----\n",
    b"<SoftwareIdentity>",
    b'{"version": 1, "hcl_report": "',
    b'[["JWT", "a.e30.c',
    b'[{"arch": "HOPPER"',
    b'{"tcb_info"',
    b"\x04\0\2\0\x81\0\0\0",
    b"\x03\0\2\0\0\0\0\0",
    b"a1b2",
    b"",
]


@given(st.sampled_from(_BEGINNINGS), st.binary(max_size=2000))
@settings(max_examples=400, deadline=None)
def test_inspection_refuses_by_name_only(beginning: bytes, rest: bytes) -> None:
    with contextlib.suppress(AppraisalError):
        inspect_document(beginning + rest)


@given(st.integers(0, 1183), st.integers(0, 255), st.integers(0, 1184))
@settings(max_examples=100, deadline=None)
def test_inspection_of_changed_reports(position: int, value: int, end: int) -> None:
    report = bytearray(REPORT)
    report[position] = value
    for data in (bytes(report), bytes(report[:end])):
        with contextlib.suppress(AppraisalError):
            inspect_document(data)
