"""The four TPM 2.0 commands that collecting a quote takes, marshalled and unmarshalled.

After "Trusted Platform Module Library, Part 3: Commands" (TPM 2.0): 22.4 TPM2_PCR_Read, 18.4
TPM2_Quote, 31.6 TPM2_NV_ReadPublic, 31.13 TPM2_NV_Read; structures of Part 2; all big-endian.
Authorisations are empty passwords (TPM_RS_PW). A transport takes a command and gives the response.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from security.attestation.octets import OctetReader
from security.errors import EvidenceMalformed, TpmFailed, TpmUnavailable

__all__ = ["DEVICE", "Tpm", "Transport", "device_transport"]

Transport = Callable[[bytes], bytes]

DEVICE = Path("/dev/tpmrm0")
"""The kernel's resource manager: sessions and objects of others are out of our way."""

MAX_RESPONSE_BYTES = 4096
PCRS = 24

_NO_SESSIONS, _SESSIONS = 0x8001, 0x8002
_NV_READ, _QUOTE, _NV_READ_PUBLIC, _PCR_READ = 0x014E, 0x0158, 0x0169, 0x017E
_RH_OWNER, _RS_PW = 0x40000001, 0x40000009
_SHA256, _RSASSA = 0x000B, 0x0014
_TRY_AGAIN = (0x908, 0x90A, 0x922)  # TPM_RC_YIELDED, TPM_RC_TESTING, TPM_RC_RETRY
_ATTEMPTS = 8
_HEADER_BYTES = 10
_NV_CHUNK = 1024
_MAX_NV_BYTES = 32 << 10
_MAX_DATA_BYTES = 50


def device_transport(path: Path = DEVICE) -> Transport:
    """Commands to a TPM of the kernel, one at a time."""

    def exchange(command: bytes) -> bytes:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise TpmUnavailable(
                f"{path}: expected a TPM that this user may use, found {error.strerror}"
            ) from None
        try:
            os.write(descriptor, command)
            return os.read(descriptor, MAX_RESPONSE_BYTES)
        except OSError as error:
            raise TpmFailed(f"{path}: expected a response, found {error.strerror}") from None
        finally:
            os.close(descriptor)

    return exchange


@dataclass(frozen=True, slots=True)
class Tpm:
    """A TPM behind a transport."""

    transport: Transport

    def read_index(self, index: int) -> bytes:
        """All bytes of an NV index, read with the owner's empty authorisation.

        Raises:
            TpmFailed: the TPM refuses, or answers something else.
            TpmUnavailable: there is none.
        """
        size = self._index_size(index)
        content = bytearray()
        while len(content) < size:
            wanted = min(_NV_CHUNK, size - len(content))
            parameters = wanted.to_bytes(2, "big") + len(content).to_bytes(2, "big")
            reader = self._authorised(_NV_READ, (_RH_OWNER, index), parameters)
            piece = _sized(reader, "data")
            if len(piece) != wanted:
                raise TpmFailed(f"NV_Read: expected {wanted} bytes, found {len(piece)}")
            content += piece
        return bytes(content)

    def _index_size(self, index: int) -> int:
        reader = self._call(_NV_READ_PUBLIC, _NO_SESSIONS, index.to_bytes(4, "big"))
        public = OctetReader(_sized(reader, "nvPublic"), "TPMS_NV_PUBLIC")
        try:
            found = public.big(4, "nvIndex")
            public.take(6, "nameAlg and attributes")
            _sized(public, "authPolicy")
            size = public.big(2, "dataSize")
            public.finish()
        except EvidenceMalformed as error:
            raise TpmFailed(f"NV_ReadPublic: {error}") from None
        if found != index or not 0 < size <= _MAX_NV_BYTES:
            raise TpmFailed(
                f"NV_ReadPublic: expected index {index:#x} of at most {_MAX_NV_BYTES} bytes, found "
                f"{found:#x} of {size}"
            )
        return size

    def read_pcrs(self) -> tuple[bytes, ...]:
        """PCR 0 to 23 of the SHA-256 bank.

        Raises:
            TpmFailed, TpmUnavailable
        """
        values: list[bytes] = []
        while len(values) < PCRS:
            # A TPM gives at most eight in one response.
            chosen = range(len(values), min(len(values) + 8, PCRS))
            reader = self._call(_PCR_READ, _NO_SESSIONS, _selection(chosen))
            try:
                reader.big(4, "pcrUpdateCounter")
                selected = reader.take(10, "pcrSelectionOut")
                count = reader.big(4, "count")
            except EvidenceMalformed as error:
                raise TpmFailed(f"PCR_Read: {error}") from None
            if selected != _selection(chosen) or count != len(chosen):
                raise TpmFailed(f"PCR_Read: expected PCRs {chosen}, found others")
            for _ in chosen:
                value = _sized(reader, "digest")
                if len(value) != 32:
                    raise TpmFailed(f"PCR_Read: expected 32 bytes, found {len(value)}")
                values.append(value)
        return tuple(values)

    def quote(self, key: int, data: bytes) -> tuple[bytes, bytes]:
        """A quote over all PCRs of the SHA-256 bank.

        Args:
            key: handle of the signing key (RSASSA with SHA-256), with empty authorisation.
            data: extraData, at most 50 bytes.

        Returns:
            TPMS_ATTEST and TPMT_SIGNATURE.

        Raises:
            TpmFailed, TpmUnavailable
        """
        if len(data) > _MAX_DATA_BYTES:
            raise ValueError(f"data: expected at most {_MAX_DATA_BYTES} bytes, found {len(data)}")
        parameters = (
            len(data).to_bytes(2, "big")
            + data
            + _RSASSA.to_bytes(2, "big")
            + _SHA256.to_bytes(2, "big")
            + _selection(range(PCRS))
        )
        reader = self._authorised(_QUOTE, (key,), parameters)
        message = _sized(reader, "quoted")
        return message, reader.take(reader.left, "signature")

    def _authorised(self, code: int, handles: Sequence[int], parameters: bytes) -> OctetReader:
        """A command with an empty password; the reader is over the parameters of the response."""
        password = _RS_PW.to_bytes(4, "big") + bytes(2) + bytes(1) + bytes(2)
        body = (
            b"".join(handle.to_bytes(4, "big") for handle in handles)
            + len(password).to_bytes(4, "big")
            + password
            + parameters
        )
        reader = self._call(code, _SESSIONS, body)
        try:
            size = reader.big(4, "parameterSize")
            return OctetReader(reader.take(size, "parameters"), "TPM response")
        except EvidenceMalformed as error:
            raise TpmFailed(f"TPM: {error}") from None

    def _call(self, code: int, tag: int, body: bytes) -> OctetReader:
        command = (
            tag.to_bytes(2, "big")
            + (_HEADER_BYTES + len(body)).to_bytes(4, "big")
            + code.to_bytes(4, "big")
            + body
        )
        for _ in range(_ATTEMPTS):
            response = self.transport(command)
            reader = OctetReader(response, "TPM response")
            try:
                found = reader.big(2, "tag")
                size = reader.big(4, "size")
                result = reader.big(4, "responseCode")
            except EvidenceMalformed as error:
                raise TpmFailed(f"TPM: {error}") from None
            if result in _TRY_AGAIN:
                continue
            if result or found != tag or size != len(response) or size > MAX_RESPONSE_BYTES:
                raise TpmFailed(
                    f"TPM command {code:#x}: expected success, found response code {result:#x}, "
                    f"tag {found:#x}, {size} of {len(response)} bytes"
                )
            return reader
        raise TpmFailed(f"TPM command {code:#x}: expected an answer, found it busy")


def _selection(pcrs: Sequence[int]) -> bytes:
    """TPML_PCR_SELECTION of one bank, SHA-256."""
    bits = sum(1 << number for number in pcrs)
    return (
        (1).to_bytes(4, "big") + _SHA256.to_bytes(2, "big") + b"\x03" + bits.to_bytes(3, "little")
    )


def _sized(reader: OctetReader, name: str) -> bytes:
    """TPM2B."""
    try:
        return reader.take(reader.big(2, f"{name} size"), name)
    except EvidenceMalformed as error:
        raise TpmFailed(f"TPM: {error}") from None
