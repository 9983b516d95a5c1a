"""Whatever the parsers of TDX and Azure vTPM evidence are given, only named errors come out."""

from __future__ import annotations

from pathlib import Path

import azure_machine
import pytest
import tdx_machine
from hypothesis import given, settings
from hypothesis import strategies as st

from security.attestation.azure_evidence import read_azure_evidence
from security.attestation.event_log import read_ccel_table, read_event_log
from security.attestation.hcl_report import read_hcl_report
from security.attestation.intel_pki import read_certificate_chain, read_pck_extension
from security.attestation.tdx_collateral import read_tdx_collateral
from security.attestation.tdx_quote import read_td_quote
from security.attestation.tpm_quote import read_rsa_signature, read_tpm_quote
from security.errors import AppraisalError

ROOT = Path(__file__).resolve().parents[2]
PARSERS = {
    "quote": (read_td_quote, tdx_machine.quote()),
    "quote-5": (read_td_quote, tdx_machine.quote(version=5, body_type=3)),
    "collateral": (read_tdx_collateral, tdx_machine.collateral()),
    "chain": (lambda data: read_certificate_chain(data, "chain"), tdx_machine.default_pck().pem),
    "event log": (
        lambda data: read_event_log(data).rtmrs(),
        tdx_machine.event_log([(1, 1, b"a"), (4, 2, b"b"), (0, 3, b"c")]),
    ),
    "CCEL": (read_ccel_table, tdx_machine.ccel_table()),
    "HCL report": (
        lambda data: read_hcl_report(data).attestation_key(),
        azure_machine.AzureMachine().hcl_report(),
    ),
    "TPM quote": (read_tpm_quote, azure_machine.AzureMachine().message()),
    "TPM signature": (
        lambda data: read_rsa_signature(data, 256),
        b"\0\x14\0\x0b\1\0" + bytes(256),
    ),
    "Azure document": (read_azure_evidence, b'{"version":1,"hcl_report":"","tpm_quote":{}}'),
}


@pytest.mark.parametrize("name", PARSERS)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_only_named_errors(name: str, data: st.DataObject) -> None:
    parse, seed = PARSERS[name]
    changed = bytearray(seed)
    for _ in range(data.draw(st.integers(0, 4))):
        offset = data.draw(st.integers(0, len(changed) - 1))
        changed[offset] = data.draw(st.integers(0, 255))
    end = data.draw(st.integers(0, len(changed)))
    for body in (
        bytes(changed),
        bytes(changed[:end]),
        bytes(changed) + data.draw(st.binary(max_size=16)),
        data.draw(st.binary(max_size=600)),
    ):
        try:
            parse(body)
        except AppraisalError as error:
            assert error.code
            assert len(str(error)) < 1000


@settings(max_examples=60, deadline=None)
@given(extension=st.binary(max_size=200))
def test_sgx_extension_gives_only_named_errors(extension: bytes) -> None:
    pck = tdx_machine.vendor().pck(extension=extension)
    chain = read_certificate_chain(pck.pem, "chain")
    with pytest.raises(AppraisalError):
        read_pck_extension(chain[0])
