"""The table of checks in docs/attestation.md says what the rules say, and every error is tested."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from security.attestation.errors import TdxCollateralMalformed
from security.attestation.tdx_collateral import read_tdx_collateral

SCRIPT = Path(__file__).parents[2] / "scripts" / "attestation_table.py"


@pytest.fixture(scope="module")
def table() -> ModuleType:
    spec = importlib.util.spec_from_file_location("attestation_table", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_document_is_current(table: ModuleType) -> None:
    assert table.differences() == [], "run scripts/attestation_table.py"


def test_a_missing_row_is_noticed(
    table: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    lines = table.DOCUMENT.read_text().splitlines()
    copy = tmp_path / "attestation.md"
    copy.write_text("\n".join(line for line in lines if "`snp.policy.debug`" not in line))
    monkeypatch.setattr(table, "DOCUMENT", copy)
    assert table.differences() == ["`snp.policy.debug` is not in the table"]


def test_every_error_has_a_test(table: ModuleType) -> None:
    assert table.untested() == []


def test_every_rule_has_errors_and_sources(table: ModuleType) -> None:
    rules = table.rules()
    assert len(rules) > 150
    assert [name for name, rule in rules.items() if not table.errors_of(rule)] == []
    assert [name for name, rule in rules.items() if len(rule.source) < 8] == []


def test_codes_are_distinct(table: ModuleType) -> None:
    codes = [item.code for item in table.error_classes().values()]
    assert len(set(codes)) == len(codes)


def test_collateral_that_does_not_parse() -> None:
    """Passed over by the verifier, with a note; its own error says why."""
    with pytest.raises(TdxCollateralMalformed) as refused:
        read_tdx_collateral(b"{}")
    assert refused.value.code == "tdx_collateral_malformed"
