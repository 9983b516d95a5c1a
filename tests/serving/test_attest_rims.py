"""Manifests in a directory of evidence are judged, whatever their names."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from attest_runs import attest
from evidence_samples import EVIDENCE, needs_evidence

from serving import cli
from serving.attest import REFUSED, SOUND

Capture = pytest.CaptureFixture[str]
SAMPLE = EVIDENCE / "nvidia" / "hopper-535.86.09"
MATCH, MISMATCH = "vbios_rim_match.xml", "vbios_rim_mismatch.xml"
BAD = "driver_rim_bad_digest.xml"


def directory(path: Path, **names: str) -> Path:
    """The GPU's evidence with some manifests, each under a name."""
    for name in ("report.hex", "chain.pem"):
        shutil.copy(SAMPLE / name, path / name)
    for name, source in names.items():
        shutil.copy(SAMPLE / source, path / f"{name}.xml")
    return path


@needs_evidence
@pytest.mark.parametrize(
    ("names", "codes"),
    [
        ({"vbios": MATCH}, set()),
        ({"vbios": MISMATCH}, {"rim_mismatch"}),
        ({"one": MATCH, "other": MISMATCH}, {"rim_mismatch"}),
        ({"vbios": MATCH, "driver": BAD}, {"rim_unusable"}),
        ({"vbios_rim_mismatch": MISMATCH}, {"rim_mismatch"}),
        ({"driver_rim_bad_digest": BAD}, {"rim_unusable"}),
        ({"vbios": MATCH, "driver_rim_bad_digest": BAD}, set()),
    ],
)
def test_manifests(capsys: Capture, tmp_path: Path, names: dict[str, str], codes: set[str]) -> None:
    answer = attest(capsys, directory(tmp_path, **names), "--at", "2024-06-10")
    assert answer.failures == codes
    assert answer.code == (REFUSED if codes else SOUND)
    for name in ("nvidia.rim.driver", "nvidia.report.nonce"):
        assert not answer.check(name)["judged"] or not answer.check(name)["ok"]


@needs_evidence
def test_what_is_no_manifest(capsys: Capture, tmp_path: Path) -> None:
    directory(tmp_path, vbios=MATCH)
    (tmp_path / "driver_rim.xml").write_text("<x/>")
    answer = attest(capsys, tmp_path, "--at", "2024-06-10")
    assert (answer.code, answer.failures) == (REFUSED, {"rim_unusable"})


@needs_evidence
def test_links_to_roots_are_not_followed(capsys: Capture, tmp_path: Path) -> None:
    for name in ("report.bin", "vcek.der"):
        shutil.copy(EVIDENCE / "snp" / "milan-azure-2023" / name, tmp_path / name)
    (tmp_path / "roots").symlink_to(EVIDENCE / "snp" / "roots")
    answer = attest(capsys, tmp_path, "--at", "2025-06-10")
    assert answer.code == REFUSED
    assert any("roots was left out" in note for note in answer.document["notes"])


def test_a_directory_is_not_inspected(capsys: Capture, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        raise SystemExit(cli.run(["attest", "inspect", str(tmp_path)]))
    assert ended.value.code == 2
    assert "expected a regular file" in capsys.readouterr().err
