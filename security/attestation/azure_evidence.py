"""Reads the JSON documents in which tools hand over evidence of Azure's confidential VMs.

Three shapes are known: bytes as lists of numbers with the VCEK in PEM, and version 1 with base64url
and hexadecimal text, for SEV-SNP with "vcek", for TDX with "td_quote".
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping

from placement.document import JSON, DocumentError, Fields, decode
from security.errors import EvidenceMalformed

__all__ = ["read_azure_evidence"]

MAX_DOCUMENT_BYTES = 1 << 20
_MAX_PART_BYTES = 64 << 10
_PCRS = 24
_BASE64URL = re.compile(r"[A-Za-z0-9_-]*={0,2}")
_PEM = re.compile(
    r"\s*-----BEGIN CERTIFICATE-----([A-Za-z0-9+/=\r\n]+)-----END CERTIFICATE-----\s*"
)
_WHERE = "Azure evidence"
_HEX = "(?:[0-9A-Fa-f]{2})+"


def read_azure_evidence(document: bytes) -> dict[str, bytes]:
    """The parts that `verify_azure_vtpm` takes.

    Raises:
        EvidenceMalformed: none of the known shapes, or beyond a bound.
    """
    try:
        decoded = decode(document, MAX_DOCUMENT_BYTES)
        read = _read_version_1 if "hcl_report" in decoded else _read_lists
        return read(decoded)
    except DocumentError as error:
        raise EvidenceMalformed(str(error)) from None


def _read_version_1(document: Mapping[str, JSON]) -> dict[str, bytes]:
    fields = Fields.of(document, _WHERE)
    fields.integer("version", 1, 1)
    quote = fields.section("tpm_quote")
    pcrs = quote.texts("pcrs", _PCRS, 64, "[0-9A-Fa-f]{64}")
    parts = {
        "hcl_report": _base64url(fields, "hcl_report"),
        "tpm_message": bytes.fromhex(quote.text("message", 2 * _MAX_PART_BYTES, _HEX)),
        "tpm_signature": bytes.fromhex(quote.text("signature", 2 * _MAX_PART_BYTES, _HEX)),
        "pcrs": bytes.fromhex("".join(pcrs)),
    }
    quote.finish()
    for name in ("vcek", "td_quote"):
        if name in fields:
            parts[name] = _base64url(fields, name)
    fields.finish()
    return parts


def _read_lists(document: Mapping[str, JSON]) -> dict[str, bytes]:
    fields = Fields.of(document, _WHERE)
    members = dict(fields.mapping("quote"))
    # A list of lists, which the reader of fields does not know: one field for each list.
    values = members.pop("pcrs", None)
    if not isinstance(values, list) or len(values) != _PCRS:
        fields.fail("quote.pcrs", f"{_PCRS} lists", type(values).__name__)
    pcrs = Fields({str(i): value for i, value in enumerate(values)}, f"{_WHERE}.quote.pcrs")
    quote = Fields(members, f"{_WHERE}.quote")
    parts = {
        "hcl_report": bytes(fields.integers("report", _MAX_PART_BYTES, 0, 255)),
        "tpm_message": bytes(quote.integers("message", _MAX_PART_BYTES, 0, 255)),
        "tpm_signature": bytes(quote.integers("signature", _MAX_PART_BYTES, 0, 255)),
        "pcrs": b"".join(bytes(pcrs.integers(str(i), 32, 0, 255)) for i in range(_PCRS)),
    }
    quote.finish()
    if "vcek" in fields:
        parts["vcek"] = _from_pem(fields, "vcek")
    fields.finish()
    return parts


def _base64url(fields: Fields, name: str) -> bytes:
    text = fields.text(name, 2 * _MAX_PART_BYTES, _BASE64URL.pattern)
    try:
        stripped = text.rstrip("=")
        return base64.urlsafe_b64decode(stripped + "=" * (-len(stripped) % 4))
    except binascii.Error:
        fields.fail(name, "base64url", f"text of {len(text)} characters")


def _from_pem(fields: Fields, name: str) -> bytes:
    match = _PEM.fullmatch(fields.text(name, _MAX_PART_BYTES))
    if match is None:
        fields.fail(name, "one certificate in PEM", "other text")
    try:
        return base64.b64decode("".join(match[1].split()), validate=True)
    except binascii.Error:
        fields.fail(name, "base64 in PEM", "other text")
