"""TPM 2.0 quotes: TPMS_ATTEST of type TPM_ST_ATTEST_QUOTE, and RSA signatures over it.

After "Trusted Platform Module Library, Part 2: Structures" (TPM 2.0): 10.12.12 TPMS_ATTEST and what
it holds, 11.3.4 TPMT_SIGNATURE; integers are big-endian.
"""

from __future__ import annotations

from dataclasses import dataclass

from security.attestation.errors import TpmQuoteMalformed
from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed

__all__ = ["PcrSelection", "TpmQuote", "read_rsa_signature", "read_tpm_quote"]

TPM_GENERATED_VALUE = 0xFF544347
TPM_ST_ATTEST_QUOTE = 0x8018
TPM_ALG_SHA256 = 0x000B
TPM_ALG_RSASSA = 0x0014
PCRS = 24

_MAX_QUOTE_BYTES = 1024
_MAX_NAME_BYTES = 66
_MAX_DATA_BYTES = 66
_MAX_DIGEST_BYTES = 64
_MAX_SELECTIONS = 16
_MAX_SELECT_BYTES = 4


@dataclass(frozen=True, slots=True)
class PcrSelection:
    """TPMS_PCR_SELECTION.

    Attributes:
        bank: hash algorithm of the PCR bank (TPMI_ALG_HASH).
        pcrs: indices of the selected PCRs, ascending.
    """

    bank: int
    pcrs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class TpmQuote:
    """TPMS_ATTEST with TPMS_QUOTE_INFO.

    Attributes:
        qualified_signer: name of the signing key.
        extra_data: data of the caller's choice, 0 to 66 bytes.
        clock: milliseconds that the TPM has been on.
        reset_count: resets of the TPM.
        restart_count: restarts or resumes since the last reset.
        safe: whether the clock never went back.
        firmware_version: the vendor's number.
        selections: which PCRs of which banks.
        pcr_digest: digest over the selected PCRs.
    """

    qualified_signer: bytes
    extra_data: bytes
    clock: int
    reset_count: int
    restart_count: int
    safe: bool
    firmware_version: int
    selections: tuple[PcrSelection, ...]
    pcr_digest: bytes


def read_tpm_quote(message: bytes) -> TpmQuote:
    """Parses what a TPM signed.

    Raises:
        TpmQuoteMalformed: not made by a TPM (magic), no quote (type), or another structure.
    """
    try:
        return _read(message)
    except TpmQuoteMalformed:
        raise
    except EvidenceMalformed as error:
        raise TpmQuoteMalformed(str(error)) from None


def _read(message: bytes) -> TpmQuote:
    if len(message) > _MAX_QUOTE_BYTES:
        raise TpmQuoteMalformed(
            f"TPM quote: expected at most {_MAX_QUOTE_BYTES} bytes, found {len(message)}"
        )
    reader = OctetReader(message, "TPM quote")
    magic = reader.big(4, "magic")
    if magic != TPM_GENERATED_VALUE:
        raise TpmQuoteMalformed(
            f"TPM quote magic: expected 0x{TPM_GENERATED_VALUE:08x}, found 0x{magic:08x}; only the "
            "TPM itself signs structures with it"
        )
    kind = reader.big(2, "type")
    if kind != TPM_ST_ATTEST_QUOTE:
        raise TpmQuoteMalformed(
            f"TPM quote type: expected 0x{TPM_ST_ATTEST_QUOTE:04x} (quote), found 0x{kind:04x}"
        )
    signer = _sized(reader, _MAX_NAME_BYTES, "qualifiedSigner")
    extra = _sized(reader, _MAX_DATA_BYTES, "extraData")
    clock = reader.big(8, "clock")
    resets = reader.big(4, "resetCount")
    restarts = reader.big(4, "restartCount")
    safe = reader.big(1, "safe")
    if safe > 1:
        raise TpmQuoteMalformed(f"TPM quote safe: expected 0 or 1, found {safe}")
    firmware = reader.big(8, "firmwareVersion")
    count = reader.big(4, "pcrSelect count")
    if count > _MAX_SELECTIONS:
        raise TpmQuoteMalformed(
            f"TPM quote pcrSelect: expected at most {_MAX_SELECTIONS} banks, found {count}"
        )
    selections = tuple(_read_selection(reader) for _ in range(count))
    digest = _sized(reader, _MAX_DIGEST_BYTES, "pcrDigest")
    reader.finish()
    return TpmQuote(signer, extra, clock, resets, restarts, safe == 1, firmware, selections, digest)


def _sized(reader: OctetReader, maximum: int, name: str) -> bytes:
    size = reader.big(2, f"{name} size")
    if size > maximum:
        raise TpmQuoteMalformed(f"TPM quote {name}: expected at most {maximum} bytes, found {size}")
    return reader.take(size, name)


def _read_selection(reader: OctetReader) -> PcrSelection:
    bank = reader.big(2, "hash")
    size = reader.big(1, "sizeofSelect")
    if size > _MAX_SELECT_BYTES:
        raise TpmQuoteMalformed(
            f"TPM quote sizeofSelect: expected at most {_MAX_SELECT_BYTES}, found {size}"
        )
    bits = int.from_bytes(reader.take(size, "pcrSelect"), "little")
    return PcrSelection(bank, tuple(i for i in range(8 * size) if bits >> i & 1))


def read_rsa_signature(data: bytes, key_bytes: int) -> tuple[int, int, bytes]:
    """Signature scheme, hash algorithm and signature.

    The signature alone, as long as the key, is taken to be RSASSA with SHA-256: a wrong guess does
    not verify. TPMT_SIGNATURE says both by itself.

    Args:
        data: what the TPM returned, in either form.
        key_bytes: length of the key's modulus.

    Raises:
        TpmQuoteMalformed: neither.
    """
    if len(data) == key_bytes:
        return TPM_ALG_RSASSA, TPM_ALG_SHA256, data
    try:
        reader = OctetReader(data, "TPMT_SIGNATURE")
        scheme, digest = reader.big(2, "sigAlg"), reader.big(2, "hash")
        signature = reader.take(reader.big(2, "size"), "signature")
        reader.finish()
    except EvidenceMalformed as error:
        raise TpmQuoteMalformed(
            f"TPM signature: expected {key_bytes} bytes or a TPMT_SIGNATURE; {error}"
        ) from None
    return scheme, digest, signature
