"""Collects the GPUs' evidence through NVML (nvidia-ml-py), on the shard's machine.

NVML puts the nonce into an SPDM GET_MEASUREMENTS request and gives back request and response
together, the bytes that the GPU has signed (as NVIDIA's attestation SDK sends them on). Switches
are not reached through NVML: their evidence comes from NSCQ, by other means.
"""

# ruff: noqa: N802 - the names are NVML's own

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Protocol

from security.attestation.errors import (
    GpuArchitectureUnsupported,
    GpuConfidentialComputingOff,
    GpuDevtoolsMode,
    GpuReportInvalid,
    NvmlUnavailable,
)
from security.attestation.spdm import NONCE_BYTES

__all__ = ["Nvml", "collect_gpus"]

MAX_GPUS = 16

_FEATURE_ENABLED = 1
_DEVTOOLS_ON = 1
_PROTECTED_PCIE = 1
_HOPPER = 9
_BLACKWELL = 10
_SUCCESS = 0
_FUNCTION_NOT_FOUND = 13


class Nvml(Protocol):
    """The part of the module `pynvml` that is used.

    Functions raise `NVMLError` with the code in `value`; `nvmlSystemGetConfComputeSettings` returns
    the code, and raises only where the library does not have it.
    """

    NVMLError: type[Exception]

    def nvmlInit(self) -> None:
        """Opens the library."""

    def nvmlShutdown(self) -> None:
        """Closes it."""

    def nvmlSystemGetConfComputeState(self) -> Any:
        """A structure with ccFeature and devToolsMode."""

    def nvmlSystemGetConfComputeSettings(self, settings: Any) -> int:
        """Fills a structure with ccFeature, devToolsMode and multiGpuMode."""

    def c_nvmlSystemConfComputeSettings_v1_t(self) -> Any:
        """That structure, with its version filled in."""

    def nvmlDeviceGetCount(self) -> int:
        """Number of GPUs."""

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        """A GPU."""

    def nvmlDeviceGetArchitecture(self, device: Any) -> int:
        """NVML_DEVICE_ARCH_*."""

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: Any, c_nonce: bytes) -> Any:
        """A structure with attestationReport and attestationReportSize."""

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: Any) -> Any:
        """A structure with attestationCertChain and attestationCertChainSize."""


def collect_gpus(nonce: bytes, nvml: Nvml | None = None) -> dict[str, bytes]:
    """Asks every GPU of the machine for a report over a nonce.

    Args:
        nonce: 32 bytes, see `security.attestation.evidence.gpu_nonce`.
        nvml: the module `pynvml`, which is imported where none is given.

    Returns:
        "gpu.0.report" and "gpu.0.chain" (PEM), "gpu.1.report", ...

    Raises:
        ValueError: a nonce of another length.
        NvmlUnavailable: no library, driver, permission or GPU, or a call failed.
        GpuConfidentialComputingOff, GpuDevtoolsMode: the GPUs are in a mode that protects nothing.
        GpuArchitectureUnsupported: a GPU that cannot attest.
        GpuReportInvalid: an answer of an impossible length.
    """
    if len(nonce) != NONCE_BYTES:
        raise ValueError(f"nonce: expected {NONCE_BYTES} bytes, found {len(nonce)}")
    library = _import() if nvml is None else nvml
    with _opened(library):
        _require_mode(library)
        count = library.nvmlDeviceGetCount()
        if not 0 < count <= MAX_GPUS:
            raise NvmlUnavailable(f"NVML: expected 1 to {MAX_GPUS} GPUs, found {count}")
        parts: dict[str, bytes] = {}
        for number in range(count):
            device = library.nvmlDeviceGetHandleByIndex(number)
            architecture = library.nvmlDeviceGetArchitecture(device)
            if architecture not in (_HOPPER, _BLACKWELL):
                raise GpuArchitectureUnsupported(
                    f"gpu.{number}: expected a Hopper (9) or Blackwell (10) GPU, found "
                    f"NVML architecture {architecture}"
                )
            report = library.nvmlDeviceGetConfComputeGpuAttestationReport(device, nonce)
            parts[f"gpu.{number}.report"] = _octets(
                report.attestationReport, report.attestationReportSize, f"gpu.{number}.report"
            )
            chain = library.nvmlDeviceGetConfComputeGpuCertificate(device)
            parts[f"gpu.{number}.chain"] = _octets(
                chain.attestationCertChain, chain.attestationCertChainSize, f"gpu.{number}.chain"
            )
        return parts


def _import() -> Nvml:
    try:
        import pynvml
    except ImportError:
        raise NvmlUnavailable(
            "NVML: expected the Python package nvidia-ml-py, found none; install it on the "
            "shard's machine"
        ) from None
    module: Nvml = pynvml
    return module


@contextmanager
def _opened(library: Nvml) -> Iterator[None]:
    """NVML open for the duration; every error of it by name, with its code."""
    try:
        library.nvmlInit()
        try:
            yield
        finally:
            library.nvmlShutdown()
    except library.NVMLError as error:
        code = getattr(error, "value", "unknown")
        raise NvmlUnavailable(
            f"NVML: expected every call to succeed, found error {code} ({error}); look at the "
            "driver, its version, and the permissions of /dev/nvidia*"
        ) from None


def _require_mode(library: Nvml) -> None:
    state = library.nvmlSystemGetConfComputeState()
    enabled = state.ccFeature == _FEATURE_ENABLED
    devtools = state.devToolsMode == _DEVTOOLS_ON
    settings = library.c_nvmlSystemConfComputeSettings_v1_t()
    if _fill(library, settings):
        enabled = enabled or settings.multiGpuMode == _PROTECTED_PCIE
        devtools = devtools or settings.devToolsMode == _DEVTOOLS_ON
    if not enabled:
        raise GpuConfidentialComputingOff(
            "GPUs: expected confidential-computing or protected-PCIe mode, found neither; turn it "
            "on with nvidia_gpu_tools on the host"
        )
    if devtools:
        raise GpuDevtoolsMode(
            "GPUs: expected confidential computing in mode on, found devtools mode, in which the "
            "host can read their memory"
        )


def _fill(library: Nvml, settings: Any) -> bool:
    """Asks for the settings; False where the driver is too old to know protected PCIe."""
    try:
        return library.nvmlSystemGetConfComputeSettings(ctypes.byref(settings)) == _SUCCESS
    except library.NVMLError as error:
        if getattr(error, "value", None) == _FUNCTION_NOT_FOUND:
            return False
        raise


def _octets(array: Any, size: int, what: str) -> bytes:
    if not 0 < size <= len(array):
        raise GpuReportInvalid(f"{what}: expected 1 to {len(array)} bytes from NVML, found {size}")
    return bytes(array[:size])
