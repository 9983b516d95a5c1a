"""Tokens of NRAS: whose keys count, and what they say beside a machine."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nvidia_machine
from hardware_lab import policy_text, write_collateral
from nras_issuer import Issuer, device_claims
from snp_machine import NOW as SNP_NOW
from snp_machine import SnpMachine

from placement.policy import parse_policy
from security.attestation.composite import judge_evidence
from security.attestation.evidence_directory import GivenFiles, read_evidence

NONCE = nvidia_machine.NONCE
TOKEN_PINS = {
    "architecture": ["Hopper"],
    "gpus": ["1"],
    "switches": ["0"],
    "open": ["driver", "vbios", "device"],
}


def write_token(directory: Path, issuer: Issuer) -> Path:
    directory.mkdir(exist_ok=True)
    token = issuer.eat({"GPU-0": device_claims("GPU-0")})
    (directory / "detached_eat.json").write_bytes(token)
    return directory


def test_a_token_beside_its_own_keys_is_not_believed(tmp_path: Path) -> None:
    forger, operator = Issuer(kid="forged"), Issuer()
    evidence = write_token(tmp_path / "evidence", forger)
    for place in (evidence, tmp_path / "roots", evidence / "roots"):
        place.mkdir(exist_ok=True)
        (place / "jwks.json").write_bytes(forger.jwks())
    given = tmp_path / "collateral"
    given.mkdir()
    (given / "jwks.json").write_bytes(operator.jwks())
    for options in (GivenFiles(), GivenFiles(collateral=(given,))):
        verdict = judge_evidence(read_evidence(evidence, options), None, nvidia_machine.NOW, NONCE)
        assert {failure.code for failure in verdict.failures} == {"nras_key_missing"}
        assert any("keys of NRAS" in note for note in verdict.notes)
    options = GivenFiles(collateral=(given,))
    write_token(evidence, operator)
    assert judge_evidence(read_evidence(evidence, options), None, nvidia_machine.NOW, NONCE).holds


def test_a_token_beside_a_machine_counts_for_nothing(tmp_path: Path) -> None:
    """Nothing binds it to the machine: it may be about the GPUs of any other."""
    operator = Issuer()
    machine = replace(SnpMachine(product="Genoa"), report_data=NONCE)
    evidence = write_token(tmp_path / "evidence", operator)
    for name, content in machine.parts().items():
        (evidence / f"{name}.bin").write_bytes(content)
    given = write_collateral(tmp_path / "collateral", machine.collateral())
    (given / "jwks.json").write_bytes(operator.jwks())
    document = json.loads(policy_text(machine, nvidia_machine.machine(1, 0).devices))
    document["requirements"]["nvidia"] = TOKEN_PINS
    policy = parse_policy(json.dumps(document))
    files = read_evidence(evidence, GivenFiles(collateral=(given,)))
    verdict = judge_evidence(files, policy, SNP_NOW, NONCE)
    assert "device_evidence_missing" in {failure.code for failure in verdict.failures}
    assert any("bound to no machine" in note for note in verdict.notes)
