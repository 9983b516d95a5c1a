"""CUDA graphs: a step's kernels recorded once and started with one call.

A decode step of a small batch is hundreds of kernels of a few microseconds. Started one by one from
Python they take longer to start than to run.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch

__all__ = ["Capturer", "CudaCapturer", "EagerCapturer", "open_capturer"]

# Libraries set themselves up in the first runs, with calls that a capture does not allow.
_WARM_UPS = 2


class Capturer(Protocol):
    """Records computations."""

    def capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """Records a computation that reads and writes memory that stays where it is.

        It is run, too, more than once: twice must be as good as once. What the recording returns
        is always the same memory, valid until another recording of this capturer runs.
        """


class CudaCapturer:
    """Records graphs on a GPU, all in one pool of memory, since one runs at a time."""

    def __init__(self, device: torch.device) -> None:
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See `Capturer`."""
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            for _ in range(_WARM_UPS):
                compute()
        torch.cuda.current_stream().wait_stream(self._stream)
        graph = torch.cuda.CUDAGraph()
        # The process' other threads may allocate pinned memory meanwhile.
        with torch.cuda.graph(
            graph, pool=self._pool, stream=self._stream, capture_error_mode="thread_local"
        ):
            output = compute()

        def replay() -> torch.Tensor:
            graph.replay()
            return output

        return replay


class EagerCapturer:
    """For devices without graphs: computes anew each time, into memory that stays."""

    def capture(self, compute: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
        """See `Capturer`."""
        output = compute().clone()

        def replay() -> torch.Tensor:
            return output.copy_(compute())

        return replay


def open_capturer(device: torch.device) -> Capturer:
    """What records on this device."""
    return CudaCapturer(device) if device.type == "cuda" else EagerCapturer()
