"""Which device a stage computes on, and how much cache fits there."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.stage.errors import DeviceUnavailable

if TYPE_CHECKING:
    import torch

    from runtime.stage.families import DecoderParts
    from runtime.stage.settings import StageSettings

__all__ = ["blocks_that_fit", "compute_device"]

# Of a GPU's memory, kept for what a step computes with: hidden states, gathered keys, logits,
# recorded graphs and the libraries' own.
_WORKING_SHARE = 0.1


def compute_device(settings: StageSettings) -> torch.device:
    """The device of a stage: what it was told, or with "auto" the GPU that the process has.

    What the process has is what its starter let it see (CUDA_VISIBLE_DEVICES, a MIG slice): a stage
    uses one GPU, the first. A stage with tensor parallelism computes on the CPU.

    Raises:
        DeviceUnavailable: a GPU was asked for, and there is none or the stage cannot use it.
    """
    import torch

    if settings.device == "cpu":
        return torch.device("cpu")
    available = torch.cuda.is_available()
    if settings.device == "auto":
        return torch.device("cuda", 0) if available and settings.tp == 1 else torch.device("cpu")
    if not available:
        raise DeviceUnavailable(
            "device: expected a CUDA GPU, found none that torch can use; start the shard where "
            "CUDA_VISIBLE_DEVICES names one and a torch with CUDA is installed, or plan for cpu"
        )
    if settings.tp > 1:
        raise DeviceUnavailable(
            f"device: expected cpu for tensor parallelism {settings.tp}, found cuda; ranks compute "
            "on the CPU: plan the stage with tensor parallelism 1"
        )
    return torch.device("cuda", 0)


def blocks_that_fit(settings: StageSettings, parts: DecoderParts, device: torch.device) -> int:
    """Cache blocks for a stage whose weights are still to be loaded: at most the plan's.

    A plan counts a machine's memory; a GPU's may be less, or shared. On the CPU the plan holds.

    Raises:
        DeviceUnavailable: the GPU cannot hold the weights and one block.
    """
    import torch

    if device.type != "cuda":
        return settings.cache_blocks
    free, total = torch.cuda.mem_get_info(device)
    item_bytes = settings.torch_dtype.itemsize
    names = [parts.layer_name(index) for index in range(settings.first_layer, settings.last_layer)]
    if settings.is_first:
        names.append(parts.EMBEDDING)
    if settings.is_last:
        names.append(parts.NORM)
        # A tied weight that is on both ends of one stage is one tensor.
        if not (settings.is_first and parts.tied):
            names.append(parts.HEAD)
    tensors = [tensor for name in names for tensor in parts.part(name).parameters()]
    weights = sum(tensor.numel() for tensor in tensors) * item_bytes
    head_size: int = getattr(parts.config, "head_dim", None) or (
        parts.config.hidden_size // parts.config.num_attention_heads
    )
    key_heads: int = parts.config.num_key_value_heads
    layers = settings.last_layer - settings.first_layer
    block = 2 * layers * settings.block_size * key_heads * head_size * item_bytes
    # One more is nobody's, see `CudaLayers`.
    blocks = int(free - weights - _WORKING_SHARE * total) // block - 1
    if blocks < 1:
        raise DeviceUnavailable(
            f"device: expected {weights} bytes for weights, {2 * block} for cache and "
            f"{_WORKING_SHARE:.0%} to work in, found {free} of {total} bytes free on the GPU; "
            "plan fewer layers for this stage or free the GPU"
        )
    return min(blocks, settings.cache_blocks)
