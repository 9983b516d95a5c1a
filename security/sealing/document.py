"""Which tensors of a checkpoint are sealed, and the names of the keys that open them.

A *unit* is what a stage is assigned as a whole, and so what has a key of its own: the embedding,
each layer, the final norm, the LM head. `sealing.json`, a plain file of the sealed checkpoint,
lists the units and, of every sealed tensor, the unit, shape and dtype that it has when opened.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final

from placement.document import DocumentError, Fields, decode, encode
from placement.sealed import SealedParts
from security.errors import CannotSeal, SealingMalformed, SelectionInvalid
from security.manifest import DTYPE_BYTES, MAX_DIMENSIONS, MAX_FILE_BYTES, MAX_TENSORS, Manifest

SEALING_FILE: Final = "sealing.json"
SEALING_ID_BYTES: Final = 32
MAX_LAYERS: Final = 4096
MAX_UNITS: Final = MAX_LAYERS + 3
MAX_SEALING_BYTES: Final = 32 << 20

EMBEDDING: Final = "embed"
NORM: Final = "norm"
HEAD: Final = "head"
UNIT_PATTERN: Final = r"embed|norm|head|layer-(?:0|[1-9][0-9]{0,3})"

_FORMAT: Final = "bulkhead-sealing-1"
_PREFIXES: Final = {"model.embed_tokens.": EMBEDDING, "model.norm.": NORM, "lm_head.": HEAD}
_LAYER_TENSOR: Final = re.compile(r"model\.layers\.(0|[1-9][0-9]{0,3})\.")
_ALL: Final = "all"
_RANGE: Final = re.compile(r"([0-9]{1,4})(?:-([0-9]{1,4}))?")
_MAX_SELECTION: Final = 4096


@dataclass(frozen=True, slots=True)
class SealedTensor:
    """A sealed tensor as it is when opened.

    Attributes:
        name: as in the checkpoint.
        unit: whose key opens it.
        dtype: a key of `DTYPE_BYTES`.
        shape: dimensions.
    """

    name: str
    unit: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Sealing:
    """The content of `sealing.json`.

    Attributes:
        sealing_id: random; every key and every chunk is bound to it.
        commitments: by unit, sorted, a digest that only the right key gives (32 bytes).
        tensors: the sealed tensors, sorted by name.
    """

    sealing_id: bytes
    commitments: dict[str, bytes]
    tensors: tuple[SealedTensor, ...]

    def to_bytes(self) -> bytes:
        """The canonical encoding."""
        return encode(
            {
                "format": _FORMAT,
                "sealing_id": self.sealing_id.hex(),
                "units": [
                    {"unit": unit, "commitment": commitment.hex()}
                    for unit, commitment in sorted(self.commitments.items())
                ],
                "tensors": [
                    {
                        "name": tensor.name,
                        "unit": tensor.unit,
                        "dtype": tensor.dtype,
                        "shape": list(tensor.shape),
                    }
                    for tensor in self.tensors
                ],
            }
        )

    @classmethod
    def from_bytes(cls, data: bytes) -> Sealing:
        """Parses what `to_bytes` wrote, and nothing else.

        Raises:
            SealingMalformed: too long, another version, not canonical, or inconsistent in itself.
        """
        try:
            reader = Fields.of(decode(data, MAX_SEALING_BYTES), SEALING_FILE)
            reader.text("format", 32, _FORMAT)
            sealing_id = reader.octets("sealing_id", SEALING_ID_BYTES)
            units = [_read_unit(item) for item in reader.sections("units", MAX_UNITS)]
            tensors = tuple(_read_tensor(item) for item in reader.sections("tensors", MAX_TENSORS))
            reader.finish()
        except DocumentError as error:
            raise SealingMalformed(str(error)) from None
        sealing = cls(sealing_id, dict(units), tensors)
        sealing._check_consistent()
        if sealing.to_bytes() != data:
            raise SealingMalformed(
                f"{SEALING_FILE}: expected the canonical encoding, found another one"
            )
        return sealing

    def _check_consistent(self) -> None:
        names = [tensor.name for tensor in self.tensors]
        if names != sorted(set(names)):
            raise SealingMalformed(f"{SEALING_FILE}: expected tensors sorted by name, none twice")
        used = {tensor.unit for tensor in self.tensors}
        if used != set(self.commitments):
            raise SealingMalformed(
                f"{SEALING_FILE}: expected the units of its tensors, found others: "
                f"{sorted(used ^ set(self.commitments))[:4]}"
            )
        for tensor in self.tensors:
            if tensor.dtype not in DTYPE_BYTES:
                raise SealingMalformed(
                    f"{SEALING_FILE}: {tensor.name[:100]!r}: expected a dtype of "
                    f"{', '.join(DTYPE_BYTES)}, found {tensor.dtype[:16]!r}"
                )
            if unit_of(tensor.name) != tensor.unit:
                raise SealingMalformed(
                    f"{SEALING_FILE}: {tensor.name[:100]!r}: expected unit "
                    f"{unit_of(tensor.name)}, found {tensor.unit}"
                )


def _read_unit(reader: Fields) -> tuple[str, bytes]:
    unit = reader.text("unit", 16, UNIT_PATTERN), reader.octets("commitment", 32)
    reader.finish()
    return unit


def _read_tensor(reader: Fields) -> SealedTensor:
    tensor = SealedTensor(
        name=reader.text("name", 512),
        unit=reader.text("unit", 16, UNIT_PATTERN),
        dtype=reader.text("dtype", 16),
        shape=reader.integers("shape", MAX_DIMENSIONS, 0, MAX_FILE_BYTES),
    )
    reader.finish()
    return tensor


# -- units --------------------------------------------------------------------------------------


def layer_unit(index: int) -> str:
    """The unit of a layer."""
    return f"layer-{index}"


def unit_of(tensor: str) -> str | None:
    """The unit that a tensor of the checkpoint belongs to, None if no stage is assigned it."""
    layer = _LAYER_TENSOR.match(tensor)
    if layer is not None:
        return layer_unit(int(layer[1]))
    return next((unit for prefix, unit in _PREFIXES.items() if tensor.startswith(prefix)), None)


def stage_units(manifest: Manifest, first_layer: int, last_layer: int, layers: int) -> list[str]:
    """The units that a stage reads, whether or not they are sealed; what a broker releases to it.

    Args:
        manifest: of the model.
        first_layer: of the stage.
        last_layer: one after the stage's last layer.
        layers: of the model.
    """
    units = [layer_unit(index) for index in range(first_layer, last_layer)]
    if first_layer == 0:
        units.append(EMBEDDING)
    if last_layer == layers:
        own_head = any(unit_of(tensor.name) == HEAD for tensor in manifest.tensors)
        units.append(NORM)
        # A tied head is computed with the embedding.
        units.append(HEAD if own_head else EMBEDDING)
    return sorted(set(units))


def sealed_parts(manifest: Manifest) -> SealedParts:
    """What of a model is sealed, as its signed manifest shows without `sealing.json` itself.

    A sealed tensor is stored as U8 of one dimension, as no tensor is that a stage reads in the
    clear. A unit counts as sealed where one of its tensors is.
    """
    if not any(file.name == SEALING_FILE for file in manifest.files):
        return SealedParts()
    sealed = {
        tensor.name: tensor.dtype == "U8" and len(tensor.shape) == 1 for tensor in manifest.tensors
    }
    units = {unit for name, is_sealed in sealed.items() if is_sealed and (unit := unit_of(name))}
    own_head = any(unit_of(name) == HEAD for name in sealed)
    prefix = layer_unit(0).removesuffix("0")
    return SealedParts(
        layers=frozenset(int(unit.removeprefix(prefix)) for unit in units if prefix in unit),
        embedding=EMBEDDING in units,
        norm=NORM in units,
        head=(HEAD if own_head else EMBEDDING) in units,
        complete=all(sealed.values()),
    )


def parse_selection(text: str) -> frozenset[str]:
    """The units that a text such as "0-3,7,embed,head" names; "all" alone is {"all"}.

    Raises:
        SelectionInvalid: it is not of that form.
    """
    if len(text) > _MAX_SELECTION:
        raise SelectionInvalid(f"layers: expected at most {_MAX_SELECTION} characters")
    units: set[str] = set()
    for item in (piece.strip() for piece in text.split(",")):
        span = _RANGE.fullmatch(item)
        if item in (EMBEDDING, NORM, HEAD, _ALL):
            units.add(item)
        elif span is not None:
            first, last = int(span[1]), int(span[2] or span[1])
            if not first <= last < MAX_LAYERS:
                raise SelectionInvalid(
                    f"layers: {item}: expected ascending numbers below {MAX_LAYERS}"
                )
            units.update(layer_unit(index) for index in range(first, last + 1))
        else:
            raise SelectionInvalid(
                f"layers: {item[:40]!r}: expected a layer (3), a range (0-3), {EMBEDDING}, {NORM}, "
                f"{HEAD} or {_ALL}, separated by commas"
            )
    return frozenset({_ALL}) if _ALL in units else frozenset(units)


def select_tensors(manifest: Manifest, selection: frozenset[str]) -> dict[str, str]:
    """The tensors to seal, each with its unit.

    Args:
        manifest: of the model in the clear.
        selection: what `parse_selection` gave.

    Raises:
        SelectionInvalid: the model has no such part.
        CannotSeal: a copy of a sealed tensor would stay readable, or a tensor is of no unit.
    """
    units = {tensor.name: unit_of(tensor.name) for tensor in manifest.tensors}
    present = {unit for unit in units.values() if unit is not None}
    if _ALL in selection:
        homeless = [name for name, unit in units.items() if unit is None]
        if homeless:
            raise CannotSeal(
                f"tensor {homeless[0]}: expected one of a layer, {EMBEDDING}, {NORM} or {HEAD}; "
                "it would stay readable. Name what to seal instead of all"
            )
        selection = frozenset(present)
    absent = sorted(selection - present)
    if absent:
        hint = (
            f"; the head of this model uses the embedding's weights, seal {EMBEDDING}"
            if absent == [HEAD] and EMBEDDING in present
            else ""
        )
        raise SelectionInvalid(
            f"layers: expected parts of this model ({_shown(present)}), "
            f"found {', '.join(absent[:4])}{hint}"
        )
    chosen = {name: unit for name, unit in units.items() if unit is not None and unit in selection}
    _check_copies(manifest, chosen)
    return chosen


def _check_copies(manifest: Manifest, chosen: dict[str, str]) -> None:
    """Refuses matrices that are stored a second time where another key, or none, opens them."""
    first: dict[str, str] = {}
    for tensor in sorted(manifest.tensors, key=lambda tensor: tensor.name not in chosen):
        # Vectors of ones and zeros are alike in many layers and tell nothing.
        if len(tensor.shape) < 2 or tensor.size == 0:
            continue
        twin = first.get(tensor.sha256)
        if twin is None:
            if tensor.name in chosen:
                first[tensor.sha256] = tensor.name
        elif chosen.get(tensor.name) != chosen[twin]:
            raise CannotSeal(
                f"tensors {twin} and {tensor.name}: expected different ones, found the same "
                "twice, which one key could not protect; save the model with tied weights "
                "(save_pretrained stores them once)"
            )


def _shown(units: set[str]) -> str:
    numbers = sorted(int(unit.removeprefix("layer-")) for unit in units if "-" in unit)
    named: list[str] = [unit for unit in (EMBEDDING, NORM, HEAD) if unit in units]
    layers = [f"layers {numbers[0]} to {numbers[-1]}"] if numbers else []
    return ", ".join(layers + named)
