from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from security.attestation.collect import choose_collector
from security.attestation.evidence import Binding
from security.errors import KeyFileError, NoCollector
from security.signing import create_key_file

BINDING = Binding(
    nonce=b"n" * 32,
    shard_key=b"k" * 32,
    role="stage-0",
    cluster="lab",
    instance="pipeline-0",
    broker_key=b"b" * 32,
    policy_digest="1" * 64,
    manifest_digest="2" * 64,
    gpu_evidence_digest="3" * 64,
)


def test_report_data_covers_every_field() -> None:
    fields = [field.name for field in dataclasses.fields(Binding)]
    seen = {BINDING.report_data()}
    for name in fields:
        value = getattr(BINDING, name)
        changed = value + (b"x" if isinstance(value, bytes) else "x")
        seen.add(replace(BINDING, **{name: changed}).report_data())
    assert len(seen) == len(fields) + 1
    assert {len(data) for data in seen} == {64}


def test_bytes_do_not_move_between_fields() -> None:
    one = replace(BINDING, role="stage-0l", cluster="ab")
    other = replace(BINDING, role="stage-0", cluster="lab")
    assert one.report_data() != other.report_data()


def test_choice_of_collector(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    create_key_file(path)
    assert choose_collector(["sev-snp", "simulated"], "n", None, None).kind == "simulated"
    assert choose_collector(["enrolled", "sev-snp"], "n", None, path).kind == "enrolled"
    with pytest.raises(NoCollector, match="sev-snp"):
        choose_collector(["sev-snp"], "n", None, path)
    with pytest.raises(KeyFileError):
        choose_collector(["enrolled"], "n", None, tmp_path / "absent")


def test_generated_code_is_current() -> None:
    pytest.importorskip("grpc_tools")
    root = Path(__file__).resolve().parents[2]
    script = root / "scripts" / "generate_protos.py"
    result = subprocess.run(
        [sys.executable, str(script), "--check"], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_security_imports_neither_ray_nor_torch_nor_pickle_users() -> None:
    code = (
        "import sys, security.broker.client, security.broker.service\n"
        "print([m for m in ('torch', 'ray', 'transformers', 'deepspeed') if m in sys.modules])"
    )
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"
