"""Finds the native decoder and says what this processor lets it do.

The library is compiled when Bulkhead is installed (see pyproject.toml): an attested node needs no
compiler. Where there is none, it fits another release, or the processor lacks the instructions,
stages compute with torch alone, which is slower and otherwise the same.
"""

from __future__ import annotations

import ctypes
import logging
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

__all__ = ["Layer", "Library", "Linear", "PackedWeight", "Shape", "Step", "Team", "load_library"]

_log = logging.getLogger(__name__)

_ABI = 4
_PATH = Path(__file__).with_name("decoder" + (sysconfig.get_config_var("EXT_SUFFIX") or ".so"))
_CPUINFO = Path("/proc/cpuinfo")
_NEEDED = frozenset({"avx2", "fma", "avx512f", "avx512bw", "avx512dq", "avx512vl"})
_BFLOAT16 = frozenset({"avx512_bf16"})
_AMX = frozenset({"amx_tile", "amx_bf16"})


class Linear(ctypes.Structure):
    """A packed weight [outputs, inputs]; see decoder.h for this and the other structures."""

    _fields_ = (
        ("tiles", ctypes.c_void_p),
        ("scales", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("inputs", ctypes.c_int64),
        ("outputs", ctypes.c_int64),
    )


class Layer(ctypes.Structure):
    """One decoder layer."""

    _fields_ = (
        ("query_key_value", Linear),
        ("attention_output", Linear),
        ("gate_up", Linear),
        ("down", Linear),
        ("before_attention", ctypes.c_void_p),
        ("query_norm", ctypes.c_void_p),
        ("key_norm", ctypes.c_void_p),
        ("after_attention", ctypes.c_void_p),
        ("before_mlp", ctypes.c_void_p),
        ("after_mlp", ctypes.c_void_p),
        ("keys", ctypes.c_void_p),
        ("values", ctypes.c_void_p),
        ("window", ctypes.c_int32),
        ("rotary_size", ctypes.c_int32),
        ("cosines", ctypes.c_void_p),
        ("sines", ctypes.c_void_p),
    )


class Shape(ctypes.Structure):
    """What all layers of a stage have in common."""

    _fields_ = (
        ("hidden", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("head_size", ctypes.c_int64),
        ("intermediate", ctypes.c_int64),
        ("block_size", ctypes.c_int64),
        ("bfloat", ctypes.c_int32),
        ("amx", ctypes.c_int32),
        ("wide_head_norm", ctypes.c_int32),
        ("gelu", ctypes.c_int32),
        ("epsilon", ctypes.c_float),
        ("scale", ctypes.c_float),
        ("soft_cap", ctypes.c_float),
        ("residual_multiplier", ctypes.c_float),
    )


class Step(ctypes.Structure):
    """The sequences of a step."""

    _fields_ = (
        ("sequences", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("starts", ctypes.c_void_p),
        ("counts", ctypes.c_void_p),
        ("tables", ctypes.c_void_p),
        ("blocks", ctypes.c_void_p),
        ("rotary_offsets", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True, eq=False)
class PackedWeight:
    """A weight [outputs, inputs] as tiles, in an order of their own.

    Attributes:
        tiles_OI: O filled up to 32, I to lines of 64 bytes of the dtype that is computed in.
        scales_O: of int8 tiles, float32; None where the tiles are of the dtype computed in.
        outputs, inputs: of the weight.
        dtype: that is computed in.
    """

    tiles_OI: torch.Tensor
    scales_O: torch.Tensor | None
    outputs: int
    inputs: int
    dtype: torch.dtype

    def linear(self, bias: int | None = None) -> Linear:
        """The structure of the linear; `bias` is the address of float32 numbers [outputs]."""
        scales = None if self.scales_O is None else self.scales_O.data_ptr()
        return Linear(self.tiles_OI.data_ptr(), scales, bias, self.inputs, self.outputs)


class Library:
    """The functions of decoder.cpp. Pointers must stay valid as long as their owners use them.

    Attributes:
        bfloat16: whether the processor multiplies bfloat16.
        amx: whether it has tile registers and this process may use them.
    """

    def __init__(self, functions: ctypes.CDLL, flags: frozenset[str]) -> None:
        self._functions = functions
        for name, result, arguments in (
            ("team_new", ctypes.c_void_p, (ctypes.c_int,)),
            ("team_free", None, (ctypes.c_void_p,)),
            ("huge_pages", None, (ctypes.c_void_p, ctypes.c_int64)),
            (
                "pack",
                None,
                (
                    ctypes.c_void_p,
                    ctypes.c_int,
                    ctypes.c_void_p,
                    ctypes.c_int64,
                    ctypes.c_int64,
                    ctypes.c_void_p,
                ),
            ),
            (
                "pack_int8",
                None,
                (
                    ctypes.c_void_p,
                    ctypes.c_int,
                    ctypes.c_void_p,
                    ctypes.c_int64,
                    ctypes.c_int64,
                    ctypes.c_void_p,
                ),
            ),
            (
                "unpack",
                None,
                (
                    ctypes.c_int,
                    ctypes.c_void_p,
                    ctypes.c_int64,
                    ctypes.c_void_p,
                    ctypes.c_int64,
                    ctypes.c_void_p,
                ),
            ),
            (
                "project",
                None,
                (
                    ctypes.c_void_p,
                    ctypes.c_int,
                    ctypes.c_int,
                    ctypes.c_void_p,
                    ctypes.c_void_p,
                    ctypes.c_int64,
                    ctypes.c_void_p,
                ),
            ),
            ("stage_new", ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)),
            ("stage_free", None, (ctypes.c_void_p,)),
            (
                "stage_rotate",
                None,
                (ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p),
            ),
            (
                "stage_forward",
                None,
                (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p),
            ),
        ):
            function = getattr(functions, f"bulkhead_{name}")
            function.restype = result
            function.argtypes = arguments
        self.bfloat16 = flags >= _BFLOAT16
        self.amx = flags >= _AMX | _BFLOAT16 and bool(functions.bulkhead_amx())

    def empty(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """Memory without content, in huge pages where there are some."""
        tensor = torch.empty(*shape, dtype=dtype)
        self._functions.bulkhead_huge_pages(tensor.data_ptr(), tensor.nbytes)
        return tensor

    def new_stage(self, shape: Shape, layers: Sequence[Layer]) -> int:
        """A stage over these layers; free it with `free_stage`."""
        array = (Layer * len(layers))(*layers)
        return int(self._functions.bulkhead_stage_new(ctypes.byref(shape), array, len(layers)))

    def rotate_stage(self, stage: int, layer: int, cosines: int, sines: int) -> None:
        """Gives a layer longer rotation tables."""
        self._functions.bulkhead_stage_rotate(stage, layer, cosines, sines)

    def forward(self, stage: int, team: Team, step: Step, hidden: int) -> None:
        """Computes a step on `hidden` in place."""
        self._functions.bulkhead_stage_forward(stage, team.pointer, ctypes.byref(step), hidden)

    def free_stage(self, stage: int) -> None:
        """Ends a stage."""
        self._functions.bulkhead_stage_free(stage)

    def pack(self, team: Team, weight_OI: torch.Tensor) -> PackedWeight:
        """The weight as tiles of its own dtype."""
        tiles = self._tiles(team, weight_OI, weight_OI.dtype)
        outputs, inputs = weight_OI.shape
        return PackedWeight(tiles, None, outputs, inputs, weight_OI.dtype)

    def pack_int8(
        self, team: Team, numbers_OI: torch.Tensor, scales_O: torch.Tensor, dtype: torch.dtype
    ) -> PackedWeight:
        """An int8 weight (see `runtime.stage.quantise`) as tiles for a stage of this dtype."""
        tiles = self._tiles(team, numbers_OI, dtype)
        outputs, inputs = numbers_OI.shape
        return PackedWeight(tiles, scales_O, outputs, inputs, dtype)

    def _tiles(self, team: Team, weight_OI: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        outputs, inputs = weight_OI.shape
        weight_OI = weight_OI.contiguous()
        line = 64 // dtype.itemsize
        shape = (-(-outputs // 32) * 32, -(-inputs // line) * line)
        tiles = self.empty(shape, weight_OI.dtype)
        pack = (
            self._functions.bulkhead_pack_int8
            if weight_OI.dtype == torch.int8
            else self._functions.bulkhead_pack
        )
        pack(
            team.pointer,
            dtype == torch.bfloat16,
            weight_OI.data_ptr(),
            outputs,
            inputs,
            tiles.data_ptr(),
        )
        return tiles

    def unpack(self, weight: PackedWeight, rows_T: torch.Tensor) -> torch.Tensor:
        """Rows [T, I] of a weight of `pack`. `rows_T`: int64, within the weight."""
        assert weight.scales_O is None, "int8 numbers are not the weight"
        rows_TI = torch.empty(len(rows_T), weight.inputs, dtype=weight.dtype)
        self._functions.bulkhead_unpack(
            weight.dtype == torch.bfloat16,
            weight.tiles_OI.data_ptr(),
            weight.inputs,
            rows_T.data_ptr(),
            len(rows_T),
            rows_TI.data_ptr(),
        )
        return rows_TI

    def project(self, team: Team, weight: PackedWeight, rows_SI: torch.Tensor) -> torch.Tensor:
        """float32 products [S, outputs] of rows, of the weight's dtype, with the weight."""
        rows_SI = rows_SI.contiguous()
        products_SO = torch.empty(len(rows_SI), weight.outputs)
        self._functions.bulkhead_project(
            team.pointer,
            weight.dtype == torch.bfloat16,
            self.amx,
            ctypes.byref(weight.linear()),
            rows_SI.data_ptr(),
            len(rows_SI),
            products_SO.data_ptr(),
        )
        return products_SO

    def new_team(self, threads: int) -> int:
        """See `Team`."""
        return int(self._functions.bulkhead_team_new(threads))

    def free_team(self, pointer: int) -> None:
        """See `Team`."""
        self._functions.bulkhead_team_free(pointer)


class Team:
    """Threads that compute together, the calling one among them. Used by one thread at a time."""

    def __init__(self, library: Library, threads: int) -> None:
        self.library = library
        self.pointer = library.new_team(threads)

    def close(self) -> None:
        """Ends the threads; nothing may be computed after it."""
        if self.pointer:
            self.library.free_team(self.pointer)
            self.pointer = 0


@cache
def load_library() -> Library | None:
    """The native decoder, None where this installation or this processor has none."""
    flags = _flags()
    if not flags >= _NEEDED:
        _log.info("native decoder: the processor lacks %s", sorted(_NEEDED - flags))
        return None
    try:
        functions = ctypes.CDLL(str(_PATH))
        found = int(functions.bulkhead_abi())
    except (OSError, AttributeError) as error:
        _log.warning(
            "native decoder: not installed (%s), stages compute with torch, which is slower; "
            "install a C++20 compiler and reinstall Bulkhead",
            type(error).__name__,
        )
        return None
    if found != _ABI:
        _log.warning(
            "native decoder: expected version %d, found %d, stages compute with torch, which is "
            "slower; reinstall Bulkhead",
            _ABI,
            found,
        )
        return None
    return Library(functions, flags)


def _flags() -> frozenset[str]:
    try:
        text = _CPUINFO.read_text(errors="replace")
    except OSError:
        return frozenset()
    for line in text.splitlines():
        name, _, value = line.partition(":")
        if name.strip() == "flags":
            return frozenset(value.split())
    return frozenset()
