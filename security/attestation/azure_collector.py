"""Collects evidence on Azure's confidential VMs: HCL report and quote of the vTPM, and what Azure's
host agent adds.

The HCL report stands in NV index 0x01400001, the vTPM's attestation key at handle 0x81000003
(Microsoft, "Confidential VM Guest Attestation Design Detail"). The certificate of the chip comes
from the instance metadata service (Trusted Hardware Identity Management), and so does the TD quote
over the TDREPORT in the HCL report. Both services are plain HTTP on the link: what they answer is
not trusted, the broker verifies it.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from placement.document import DocumentError, Fields, decode
from security.attestation.document_files import certificates_in
from security.attestation.evidence import Evidence, encode_parts
from security.attestation.hcl_report import HardwareType, read_hcl_report
from security.attestation.tpm_commands import Tpm, device_transport
from security.attestation.tpm_quote import read_tpm_quote
from security.errors import EvidenceMalformed, MetadataServiceFailed, TpmFailed

__all__ = ["AK_HANDLE", "HCL_INDEX", "KIND", "AzureCollector", "Fetch", "fetch_metadata"]

KIND = "azure-vtpm"
HCL_INDEX = 0x01400001
AK_HANDLE = 0x81000003
CERTIFICATION_PATH = "/metadata/THIM/amd/certification"
TD_QUOTE_PATH = "/acc/tdquote"
MAX_EXTRA_DATA_BYTES = 48

Fetch = Callable[[str, bytes | None], bytes]
"""Path and body to POST, or None to GET, to the answer; raises MetadataServiceFailed."""

_HOST = "169.254.169.254"
_TIMEOUT_S = 10.0
_MAX_ANSWER_BYTES = 256 << 10
_ATTEMPTS = 3


def fetch_metadata(path: str, body: bytes | None) -> bytes:
    """Asks the instance metadata service, directly: never through a proxy of the environment.

    Raises:
        MetadataServiceFailed
    """
    connection = http.client.HTTPConnection(_HOST, 80, timeout=_TIMEOUT_S)
    try:
        headers = {"Metadata": "true", "Content-Type": "application/json"}
        connection.request("GET" if body is None else "POST", path, body, headers)
        answer = connection.getresponse()
        content = answer.read(_MAX_ANSWER_BYTES + 1)
    except (OSError, http.client.HTTPException) as error:
        raise MetadataServiceFailed(
            f"http://{_HOST}{path}: expected an answer, found {type(error).__name__}"
        ) from None
    finally:
        connection.close()
    if answer.status != 200 or len(content) > _MAX_ANSWER_BYTES:
        raise MetadataServiceFailed(
            f"http://{_HOST}{path}: expected status 200 and at most {_MAX_ANSWER_BYTES} bytes, "
            f"found status {answer.status} and {len(content)}"
        )
    return content


@dataclass(frozen=True, slots=True)
class AzureCollector:
    """Makes evidence of an Azure confidential VM.

    Attributes:
        tpm: the vTPM.
        fetch: how the metadata service is asked.
    """

    tpm: Tpm
    fetch: Fetch = fetch_metadata

    @classmethod
    def detect(cls) -> AzureCollector:
        """The collector of this machine.

        Raises:
            TpmUnavailable, TpmFailed: no vTPM with an HCL report.
        """
        found = cls(Tpm(device_transport()))
        found.tpm.read_index(HCL_INDEX)
        return found

    @property
    def kind(self) -> str:
        """The kind of evidence."""
        return KIND

    def collect(self, report_data: bytes) -> Evidence:
        """Evidence over the report data (64 bytes), of which extraData holds the SHA-256.

        Raises:
            CollectionError: by its subclasses, TPM or metadata service failed.
        """
        return Evidence(KIND, encode_parts(self.collect_parts(report_data)))

    def collect_parts(self, data: bytes) -> dict[str, bytes]:
        """The same in parts; data of at most 48 bytes goes into extraData as it is."""
        extra = data if len(data) <= MAX_EXTRA_DATA_BYTES else hashlib.sha256(data).digest()
        blob = self.tpm.read_index(HCL_INDEX)
        pcrs, message, signature = self._quote(extra)
        parts = {
            "hcl_report": blob,
            "tpm_message": message,
            "tpm_signature": signature,
            "pcrs": b"".join(pcrs),
        }
        try:
            report = read_hcl_report(blob)
        except EvidenceMalformed as error:
            raise TpmFailed(f"NV index {HCL_INDEX:#x}: {error}") from None
        if report.hardware is HardwareType.SNP:
            return parts | {"vcek": self._vcek()}
        return parts | {"td_quote": self._td_quote(report.report)}

    def _quote(self, extra: bytes) -> tuple[tuple[bytes, ...], bytes, bytes]:
        """PCRs, and a quote over these very values: another extends them at any time."""
        for _ in range(_ATTEMPTS):
            pcrs = self.tpm.read_pcrs()
            message, signature = self.tpm.quote(AK_HANDLE, extra)
            try:
                digest = read_tpm_quote(message).pcr_digest
            except EvidenceMalformed as error:
                raise TpmFailed(f"quote: {error}") from None
            if digest == hashlib.sha256(b"".join(pcrs)).digest():
                return pcrs, message, signature
        raise TpmFailed("quote: expected PCRs that stay as they are, found them changing")

    def _vcek(self) -> bytes:
        answer = self.fetch(CERTIFICATION_PATH, None)
        found = certificates_in(_text(answer, "vcekCert").encode("utf-8"))
        if len(found) != 1:
            raise MetadataServiceFailed(
                f"vcekCert: expected one certificate in PEM, found {len(found)}"
            )
        return found[0]

    def _td_quote(self, report: bytes) -> bytes:
        asked = base64.urlsafe_b64encode(report).rstrip(b"=").decode("ascii")
        text = _text(self.fetch(TD_QUOTE_PATH, json.dumps({"report": asked}).encode()), "quote")
        if re.fullmatch(r"[A-Za-z0-9_-]+={0,2}", text) is None or len(text.rstrip("=")) % 4 == 1:
            raise MetadataServiceFailed("quote: expected base64url, found other text")
        return base64.urlsafe_b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4))


def _text(answer: bytes, name: str) -> str:
    try:
        return Fields.of(decode(answer, _MAX_ANSWER_BYTES), "answer").text(name, 65536)
    except DocumentError as error:
        raise MetadataServiceFailed(str(error)) from None
