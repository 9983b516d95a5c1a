"""Writes sealed checkpoints, and opens them again for their owner.

The sealed directory has the same files under the same names. In a safetensors file a sealed tensor
stands where it stood, as U8 of its sealed bytes; every other tensor is byte for byte the same. New
are `sealing.json` (part of the manifest) and `sealed_keys.json` (not part of it). One chunk at a
time is in memory; a directory appears under its name when all of it is written.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO, Final

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from security.errors import (
    CannotSeal,
    FileUnusable,
    MalformedSafetensors,
    OutputExists,
    SealedKeysForOtherModel,
    SealedKeysMalformed,
)
from security.manifest import (
    DTYPE_BYTES,
    MAX_HEADER_BYTES,
    ModelFiles,
    TensorRecord,
    build_manifest,
)
from security.sealing.cipher import CHUNK_BYTES, KEY_BYTES, TensorCipher, commitment
from security.sealing.document import (
    SEALING_FILE,
    SEALING_ID_BYTES,
    SealedTensor,
    Sealing,
    select_tensors,
)
from security.sealing.keys import (
    MAX_SEALED_KEYS_BYTES,
    SEALED_KEYS_FILE,
    UnsealKeys,
    WrappedKeys,
    wrap_keys,
)
from security.sealing.reader import SealedModelFiles

# What a model needs beside its tensors. A file of another kind could hold weights.
_COPIED_SUFFIXES: Final = frozenset(
    {".json", ".txt", ".jinja", ".model", ".tiktoken", ".bpe", ".vocab", ".spm", ".yaml", ".yml"}
)

Pieces = Callable[[str], Iterator[memoryview | bytes]]


@dataclass(frozen=True, slots=True)
class SealReport:
    """What was done.

    Attributes:
        units: the units that were sealed or opened, sorted.
        tensors: how many tensors they have.
        plain_tensors: how many others there are.
        sealed_bytes: bytes of the former, in the clear.
        left_out: files that were not copied, because they could hold weights.
        manifest_digest: of what was written, as a plan names it.
    """

    units: tuple[str, ...]
    tensors: int
    plain_tensors: int
    sealed_bytes: int
    left_out: tuple[str, ...]
    manifest_digest: str


def seal_checkpoint(
    model_dir: Path, output: Path, selection: frozenset[str], recipients: Sequence[bytes]
) -> SealReport:
    """Writes a copy of a checkpoint in which chosen parts are encrypted under fresh keys.

    Args:
        model_dir: the checkpoint; run where it is trusted.
        output: directory to make; nothing may be there.
        selection: what `parse_selection` gave.
        recipients: X25519 public keys (32 bytes) that the keys are wrapped for.

    Raises:
        SelectionInvalid, CannotSeal, OutputExists
        FileUnusable: the output cannot be written.
        MalformedInput: a recipient's key is not usable.
        ManifestError: the checkpoint is not one that Bulkhead serves, or changed meanwhile.
    """
    if not recipients:
        raise ValueError("recipients: expected at least the owner's, found none")
    _refuse_existing(output)
    manifest = build_manifest(model_dir)
    if any(file.name == SEALING_FILE for file in manifest.files):
        raise CannotSeal(f"{model_dir}: expected a plain checkpoint, found a sealed one; unseal it")
    chosen = select_tensors(manifest, selection)
    sealing_id = secrets.token_bytes(SEALING_ID_BYTES)
    keys = UnsealKeys({unit: secrets.token_bytes(KEY_BYTES) for unit in sorted(chosen.values())})
    wrapped = wrap_keys(keys, sealing_id, list(recipients))
    records = {tensor.name: tensor for tensor in manifest.tensors}
    sealing = Sealing(
        sealing_id,
        {unit: commitment(key, sealing_id, unit) for unit, key in keys.items()},
        tuple(
            SealedTensor(name, unit, records[name].dtype, records[name].shape)
            for name, unit in sorted(chosen.items())
        ),
    )
    ciphers = {
        tensor.name: TensorCipher(keys[tensor.unit], sealing_id, tensor)
        for tensor in sealing.tensors
    }

    def stored(record: TensorRecord) -> TensorRecord:
        cipher = ciphers.get(record.name)
        if cipher is None:
            return record
        return replace(record, dtype="U8", shape=(cipher.sealed_bytes,))

    with ModelFiles(model_dir, manifest) as files, _new_directory(output) as directory:

        def pieces(name: str) -> Iterator[memoryview | bytes]:
            if name not in ciphers:
                yield from files.stream_tensor(name, CHUNK_BYTES)
                return
            index = 0
            for index, piece in enumerate(files.stream_tensor(name, CHUNK_BYTES)):
                yield ciphers[name].seal(index, piece)
            if records[name].size == 0:
                yield ciphers[name].seal(0, b"")

        left_out = _copy_plain_files(files, directory, frozenset())
        _write_weights(files, directory, stored, pieces)
        _write_file(directory / SEALING_FILE, sealing.to_bytes())
        _write_file(directory / SEALED_KEYS_FILE, wrapped.to_bytes(), mode=0o600)
        digest = build_manifest(directory).digest
    return SealReport(
        units=tuple(sorted(keys)),
        tensors=len(chosen),
        plain_tensors=len(records) - len(chosen),
        sealed_bytes=sum(records[name].size for name in chosen),
        left_out=left_out,
        manifest_digest=digest,
    )


def unseal_checkpoint(sealed_dir: Path, output: Path, key: X25519PrivateKey) -> SealReport:
    """Writes the checkpoint in the clear again: for the owner, where it may be in the clear.

    Args:
        sealed_dir: what `seal_checkpoint` wrote.
        output: directory to make; nothing may be there.
        key: a recipient's private key, such as the owner's recovery key.

    Raises:
        SealingError: of the document, the keys or a chunk; nothing is left at `output`.
        ManifestError, FileUnusable
    """
    _refuse_existing(output)
    manifest = build_manifest(sealed_dir)
    if not any(file.name == SEALING_FILE for file in manifest.files):
        raise FileUnusable(f"{sealed_dir}: expected {SEALING_FILE}, found none; it is not sealed")
    wrapped = read_wrapped_keys(sealed_dir)
    with SealedModelFiles(sealed_dir, manifest, UnsealKeys({})) as listed:
        sealing = listed.sealing
    if wrapped.sealing_id != sealing.sealing_id:
        raise SealedKeysForOtherModel(
            f"{SEALED_KEYS_FILE}: expected keys of sealing {sealing.sealing_id.hex()[:16]}..., "
            f"found those of {wrapped.sealing_id.hex()[:16]}...; copy the file that was written "
            "with this checkpoint"
        )
    keys = wrapped.unwrap(key, sorted(sealing.commitments))
    opened = {tensor.name: tensor for tensor in sealing.tensors}
    with (
        SealedModelFiles(sealed_dir, manifest, keys) as files,
        _new_directory(output, 0o700) as directory,
    ):
        left_out = _copy_plain_files(files, directory, frozenset({SEALING_FILE}))
        _write_weights(files, directory, lambda record: record, files.stream_opened)
        clear = build_manifest(directory)
    return SealReport(
        units=tuple(sorted(keys)),
        tensors=len(opened),
        plain_tensors=len(manifest.tensors) - len(opened),
        sealed_bytes=sum(tensor.size for tensor in clear.tensors if tensor.name in opened),
        left_out=left_out,
        manifest_digest=clear.digest,
    )


def read_wrapped_keys(sealed_dir: Path) -> WrappedKeys:
    """Reads `sealed_keys.json`; raises FileUnusable, SealedKeysMalformed."""
    path = sealed_dir / SEALED_KEYS_FILE
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as file:
            content = file.read(MAX_SEALED_KEYS_BYTES + 1)
    except OSError as error:
        raise FileUnusable(f"{path}: could not be read: {error.strerror}") from None
    if len(content) > MAX_SEALED_KEYS_BYTES:
        raise SealedKeysMalformed(f"{path}: expected at most {MAX_SEALED_KEYS_BYTES} bytes")
    return WrappedKeys.from_bytes(content)


# -- files --------------------------------------------------------------------------------------


def _copy_plain_files(
    files: ModelFiles, directory: Path, without: frozenset[str]
) -> tuple[str, ...]:
    """Copies what is no weights; returns the names of what could be."""
    left_out: list[str] = []
    for name in files.file_names():
        if name in without:
            continue
        if Path(name).suffix.lower() in _COPIED_SUFFIXES:
            _write_file(directory / name, files.read_file(name))
        else:
            left_out.append(name)
    return tuple(left_out)


def _write_weights(
    files: ModelFiles,
    directory: Path,
    form: Callable[[TensorRecord], TensorRecord],
    pieces: Pieces,
) -> None:
    """Writes each safetensors file anew.

    Args:
        files: the source.
        directory: to write into.
        form: gives a tensor's dtype and shape as written.
        pieces: gives a tensor's bytes as written.
    """
    for file in files.manifest.files:
        if not file.is_safetensors:
            continue
        tensors = sorted(
            (files.tensor_info(t.name) for t in files.manifest.tensors if t.file == file.name),
            key=lambda tensor: (tensor.begin, tensor.end),
        )
        header = _header([form(tensor) for tensor in tensors], files.weights_metadata(file.name))
        with _create(directory / file.name) as output:
            output.write(header)
            for tensor in tensors:
                for piece in pieces(tensor.name):
                    output.write(piece)


def _header(tensors: Sequence[TensorRecord], metadata: Mapping[str, str]) -> bytes:
    """Length field and header of a safetensors file that holds these tensors in this order."""
    document: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    position = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        document[tensor.name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "data_offsets": [position, position + size],
        }
        position += size
    text = json.dumps(document, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise MalformedSafetensors(f"header: expected at most {MAX_HEADER_BYTES} bytes")
    return len(text).to_bytes(8, "little") + text


def _refuse_existing(output: Path) -> None:
    if os.path.lexists(output):
        raise OutputExists(f"{output}: expected nothing there, found something; name another one")


@contextmanager
def _new_directory(output: Path, mode: int = 0o777) -> Iterator[Path]:
    """A directory to fill, which then appears under its name; gone if anything fails."""
    partial = output.parent / f".{output.name}.{secrets.token_hex(8)}.partial"
    try:
        partial.mkdir(mode)
    except OSError as error:
        raise FileUnusable(f"{output}: could not be made: {error.strerror}") from None
    try:
        yield partial
        _sync_directory(partial)
        try:
            os.rename(partial, output)
        except OSError as error:
            raise OutputExists(f"{output}: could not be put there: {error.strerror}") from None
        _sync_directory(output.parent)
    except OSError as error:
        raise FileUnusable(f"{output}: could not be written: {error.strerror}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _create(path: Path, mode: int = 0o666) -> Iterator[BinaryIO]:
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, mode), "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def _write_file(path: Path, content: bytes, mode: int = 0o666) -> None:
    with _create(path, mode) as file:
        file.write(content)
