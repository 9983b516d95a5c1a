"""Stands in for the module `pynvml` on a machine without GPUs.

It behaves as nvidia-ml-py documents it: ctypes structures of the real module, calls fail with
NVML_ERROR_UNINITIALIZED before nvmlInit and after nvmlShutdown, and errors are `NVMLError` with a
code in `value`, except for nvmlSystemGetConfComputeSettings, which returns its code.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pynvml
from nvidia_machine import Device


@dataclass
class NvmlStandIn:
    """A driver with GPUs.

    Attributes:
        gpus: in NVML's order.
        feature: ccFeature.
        devtools: devToolsMode.
        multi_gpu: multiGpuMode of the settings.
        architectures: of each GPU, Hopper where there is none.
        failures: by the name of a function, the code with which it fails.
        settings_code: what nvmlSystemGetConfComputeSettings returns.
        sizes: sizes that are reported instead of the true ones, by field.
        calls: names of the functions that were called.
    """

    gpus: Sequence[Device] = ()
    feature: int = pynvml.NVML_CC_SYSTEM_FEATURE_ENABLED
    devtools: int = pynvml.NVML_CC_SYSTEM_DEVTOOLS_MODE_OFF
    multi_gpu: int = pynvml.NVML_CC_SYSTEM_MULTIGPU_NONE
    architectures: Sequence[int] = ()
    failures: Mapping[str, int] = field(default_factory=dict)
    settings_code: int = 0
    sizes: Mapping[str, int] = field(default_factory=dict)
    calls: list[str] = field(default_factory=list)
    opened: int = 0

    NVMLError = pynvml.NVMLError

    def _enter(self, name: str) -> None:
        self.calls.append(name)
        if name in self.failures:
            raise pynvml.NVMLError(self.failures[name])
        if name != "nvmlInit" and not self.opened:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_UNINITIALIZED)

    def nvmlInit(self) -> None:
        self._enter("nvmlInit")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self._enter("nvmlShutdown")
        self.opened -= 1

    def nvmlSystemGetConfComputeState(self) -> Any:
        self._enter("nvmlSystemGetConfComputeState")
        state = pynvml.c_nvmlConfComputeSystemState_t()
        state.environment = pynvml.NVML_CC_SYSTEM_ENVIRONMENT_PROD
        state.ccFeature = self.feature
        state.devToolsMode = self.devtools
        return state

    def c_nvmlSystemConfComputeSettings_v1_t(self) -> Any:
        return pynvml.c_nvmlSystemConfComputeSettings_v1_t()

    def nvmlSystemGetConfComputeSettings(self, settings: Any) -> int:
        self._enter("nvmlSystemGetConfComputeSettings")
        target = settings._obj
        if target.version != pynvml.nvmlSystemConfComputeSettings_v1:
            return int(pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH)
        if not self.settings_code:
            target.ccFeature = self.feature
            target.devToolsMode = self.devtools
            target.multiGpuMode = self.multi_gpu
        return self.settings_code

    def nvmlDeviceGetCount(self) -> int:
        self._enter("nvmlDeviceGetCount")
        return len(self.gpus)

    def nvmlDeviceGetHandleByIndex(self, index: int) -> Any:
        self._enter("nvmlDeviceGetHandleByIndex")
        if not 0 <= index < len(self.gpus):
            raise pynvml.NVMLError(pynvml.NVML_ERROR_INVALID_ARGUMENT)
        return index

    def nvmlDeviceGetArchitecture(self, device: Any) -> int:
        self._enter("nvmlDeviceGetArchitecture")
        if not self.architectures:
            return int(pynvml.NVML_DEVICE_ARCH_HOPPER)
        return self.architectures[device]

    def nvmlDeviceGetConfComputeGpuAttestationReport(self, device: Any, c_nonce: bytes) -> Any:
        self._enter("nvmlDeviceGetConfComputeGpuAttestationReport")
        made = pynvml.c_nvmlConfComputeGpuAttestationReport_t()
        made.nonce = (ctypes.c_uint8 * len(c_nonce))(*c_nonce)
        data = self.gpus[device].report(bytes(made.nonce))
        made.attestationReport[: len(data)] = data
        made.attestationReportSize = self.sizes.get("attestationReportSize", len(data))
        return made

    def nvmlDeviceGetConfComputeGpuCertificate(self, device: Any) -> Any:
        self._enter("nvmlDeviceGetConfComputeGpuCertificate")
        made = pynvml.c_nvmlConfComputeGpuCertificate_t()
        data = self.gpus[device].pem()
        made.attestationCertChain[: len(data)] = data
        made.attestationCertChainSize = self.sizes.get("attestationCertChainSize", len(data))
        return made
