"""The collector, on an NVML that stands in for a machine with GPUs."""

from __future__ import annotations

import sys

import pynvml
import pytest
from nvidia_machine import NONCE, NOW, collateral, expectations, gpu, machine
from nvml_stand_in import NvmlStandIn

from security.attestation.errors import (
    GpuArchitectureUnsupported,
    GpuConfidentialComputingOff,
    GpuDevtoolsMode,
    GpuReportInvalid,
    NvmlUnavailable,
)
from security.attestation.nvidia import verify_nvidia
from security.attestation.nvml import collect_gpus
from security.errors import NoCollector

CALLS = (
    "nvmlInit",
    "nvmlShutdown",
    "nvmlSystemGetConfComputeState",
    "nvmlDeviceGetCount",
    "nvmlDeviceGetHandleByIndex",
    "nvmlDeviceGetArchitecture",
    "nvmlDeviceGetConfComputeGpuAttestationReport",
    "nvmlDeviceGetConfComputeGpuCertificate",
)


def test_what_is_collected_is_accepted() -> None:
    gpus = machine(2, 0).devices
    library = NvmlStandIn(gpus)
    parts = collect_gpus(NONCE, library)
    assert sorted(parts) == ["gpu.0.chain", "gpu.0.report", "gpu.1.chain", "gpu.1.report"]
    verify_nvidia(parts, collateral(), expectations(gpus), NOW, NONCE).require()
    assert library.opened == 0


def test_protected_pcie_counts_as_confidential() -> None:
    library = NvmlStandIn(
        [gpu()],
        feature=pynvml.NVML_CC_SYSTEM_FEATURE_DISABLED,
        multi_gpu=pynvml.NVML_CC_SYSTEM_MULTIGPU_PROTECTED_PCIE,
    )
    assert len(collect_gpus(NONCE, library)) == 2


@pytest.mark.parametrize("code", [3, 13, 25])
def test_older_drivers_without_settings(code: int) -> None:
    missing = {"nvmlSystemGetConfComputeSettings": code} if code == 13 else {}
    library = NvmlStandIn([gpu()], settings_code=code, failures=missing)
    assert len(collect_gpus(NONCE, library)) == 2
    library = NvmlStandIn([gpu()], feature=0, settings_code=code, failures=missing)
    with pytest.raises(GpuConfidentialComputingOff):
        collect_gpus(NONCE, library)


def test_modes_that_protect_nothing() -> None:
    library = NvmlStandIn([gpu()], feature=pynvml.NVML_CC_SYSTEM_FEATURE_DISABLED)
    with pytest.raises(GpuConfidentialComputingOff):
        collect_gpus(NONCE, library)
    library = NvmlStandIn([gpu()], devtools=pynvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_ON)
    with pytest.raises(GpuDevtoolsMode):
        collect_gpus(NONCE, library)
    assert library.opened == 0
    assert "nvmlDeviceGetConfComputeGpuAttestationReport" not in library.calls


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize(
    "code",
    [
        pynvml.NVML_ERROR_UNINITIALIZED,
        pynvml.NVML_ERROR_NOT_SUPPORTED,
        pynvml.NVML_ERROR_NO_PERMISSION,
        pynvml.NVML_ERROR_DRIVER_NOT_LOADED,
        pynvml.NVML_ERROR_LIBRARY_NOT_FOUND,
        pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
        pynvml.NVML_ERROR_GPU_IS_LOST,
        pynvml.NVML_ERROR_UNKNOWN,
    ],
)
def test_every_failing_call_has_a_name(call: str, code: int) -> None:
    library = NvmlStandIn([gpu()], failures={call: code})
    with pytest.raises(NvmlUnavailable, match=f"error {code} ") as refusal:
        collect_gpus(NONCE, library)
    assert isinstance(refusal.value, NoCollector)
    if call not in ("nvmlInit", "nvmlShutdown"):
        assert library.calls[-1] == "nvmlShutdown" and library.opened == 0


def test_an_error_of_the_settings_call_is_not_an_old_driver() -> None:
    failures = {"nvmlSystemGetConfComputeSettings": pynvml.NVML_ERROR_UNKNOWN}
    with pytest.raises(NvmlUnavailable):
        collect_gpus(NONCE, NvmlStandIn([gpu()], failures=failures))


def test_no_gpus() -> None:
    with pytest.raises(NvmlUnavailable, match="GPUs"):
        collect_gpus(NONCE, NvmlStandIn())


def test_architectures() -> None:
    one, other = machine(2, 0).devices
    ok = (pynvml.NVML_DEVICE_ARCH_HOPPER, pynvml.NVML_DEVICE_ARCH_BLACKWELL)
    assert len(collect_gpus(NONCE, NvmlStandIn([one, other], architectures=ok))) == 4
    old = (pynvml.NVML_DEVICE_ARCH_HOPPER, pynvml.NVML_DEVICE_ARCH_AMPERE)
    with pytest.raises(GpuArchitectureUnsupported, match=r"gpu\.1"):
        collect_gpus(NONCE, NvmlStandIn([one, other], architectures=old))


@pytest.mark.parametrize("size", [0, 100000])
@pytest.mark.parametrize("name", ["attestationReportSize", "attestationCertChainSize"])
def test_impossible_lengths(name: str, size: int) -> None:
    with pytest.raises(GpuReportInvalid):
        collect_gpus(NONCE, NvmlStandIn([gpu()], sizes={name: size}))


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_nonces_of_another_length(size: int) -> None:
    with pytest.raises(ValueError, match="32 bytes"):
        collect_gpus(bytes(size), NvmlStandIn([gpu()]))


def test_the_real_module_without_a_driver() -> None:
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        with pytest.raises(NvmlUnavailable):
            collect_gpus(NONCE)
    else:
        pynvml.nvmlShutdown()
        pytest.skip("this machine has an NVIDIA driver")


def test_no_module(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with pytest.raises(NvmlUnavailable, match="nvidia-ml-py"):
        collect_gpus(NONCE)
