"""The manifest: digests of every file and tensor of a model, and readers that check them.

The owner signs a manifest once. A shard then reads nothing of the model that is not in it, and
everything it reads is hashed from the very bytes that it goes on to use: there is no second read
that could see other content. A file is a plain file (config, tokenizer, chat template), read as a
whole, or a safetensors file, of which the header and each tensor have digests of their own.

Safetensors format: https://huggingface.co/docs/safetensors (eight bytes little-endian header
length, JSON header, then the tensors without gaps).
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import threading
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Final, Self

from placement.document import DocumentError, Encodable, Fields, decode, digest, encode
from security.errors import (
    FileNotInManifest,
    MalformedInput,
    MalformedSafetensors,
    ManifestMismatch,
    NoCheckpoint,
    PickleOnlyCheckpoint,
    UnsafeFile,
)

MAX_MANIFEST_BYTES = 32 << 20
MAX_HEADER_BYTES = 100_000_000
"""Longest safetensors header, the limit of the reference implementation."""

MAX_PLAIN_FILE_BYTES = 256 << 20
MAX_FILES = 4096
MAX_TENSORS = 1 << 18
MAX_FILE_BYTES = 1 << 46
MAX_DIMENSIONS = 8
MAX_METADATA_TEXT = 1 << 20

DTYPE_BYTES: Final[Mapping[str, int]] = MappingProxyType(
    {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F8_E4M3": 1,
        "F8_E5M2": 1,
        "U16": 2,
        "I16": 2,
        "F16": 2,
        "BF16": 2,
        "U32": 4,
        "I32": 4,
        "F32": 4,
        "U64": 8,
        "I64": 8,
        "F64": 8,
    }
)
"""Bytes of one element by safetensors dtype; others are refused."""

_FORMAT = "bulkhead-manifest-1"
_CHUNK = 8 << 20
_NAME = r"[A-Za-z0-9_][A-Za-z0-9._+=-]{0,199}"
_TENSOR_NAME_LENGTH = 512
# The wrapped keys of a sealed checkpoint (security/sealing) are for the broker and the owner; nodes
# have no use for them, and they may be wrapped anew without a new manifest.
_IGNORED = re.compile(
    r"(readme|license|licence|notice|use_policy)(\..*)?|.*\.(md|py|pyc)|sealed_keys\.json", re.I
)
_PICKLE = re.compile(r".*\.(bin|pt|pth|pkl|pickle|ckpt|joblib|msgpack)", re.I)
# Weights in formats that nothing here reads: hashing them would only cost time.
_OTHER_WEIGHTS = re.compile(r".*\.(h5|gguf|onnx|tflite|onnx_data|ot)", re.I)
_ABSENT = "0" * 64


@dataclass(frozen=True, slots=True)
class ManifestFile:
    """One file of the model.

    Attributes:
        name: file name inside the model's directory; there are no sub-directories.
        size: bytes.
        sha256: digest (hex) of the whole file.
        header_size: for safetensors, bytes before the first tensor, the length field included;
            0 for a plain file.
        header_sha256: digest (hex) of those bytes; empty for a plain file.
    """

    name: str
    size: int
    sha256: str
    header_size: int = 0
    header_sha256: str = ""

    @property
    def is_safetensors(self) -> bool:
        """Whether the file holds tensors."""
        return self.header_size > 0


@dataclass(frozen=True, slots=True)
class TensorRecord:
    """One tensor.

    Attributes:
        name: as in the checkpoint, e.g. "model.layers.0.mlp.up_proj.weight".
        file: the safetensors file that holds it.
        dtype: a key of `DTYPE_BYTES`.
        shape: dimensions.
        begin: first byte, counted from the end of the file's header.
        end: byte after the last.
        sha256: digest (hex) of the bytes.
    """

    name: str
    file: str
    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int
    sha256: str

    @property
    def size(self) -> int:
        """Bytes."""
        return self.end - self.begin


@dataclass(frozen=True, slots=True)
class Manifest:
    """Every file and tensor of a model, each sorted by name."""

    files: tuple[ManifestFile, ...]
    tensors: tuple[TensorRecord, ...]

    def to_bytes(self) -> bytes:
        """The canonical encoding, which is what gets signed."""
        return encode(
            {
                "format": _FORMAT,
                "files": [_file_document(file) for file in self.files],
                "tensors": [_tensor_document(tensor) for tensor in self.tensors],
            }
        )

    @property
    def digest(self) -> str:
        """SHA-256 (hex) of `to_bytes`."""
        return digest(self.to_bytes())

    @classmethod
    def from_bytes(cls, data: bytes) -> Manifest:
        """Parses what `to_bytes` wrote, and nothing else.

        Raises:
            MalformedInput: too long, not canonical, or inconsistent in itself.
        """
        try:
            reader = Fields.of(decode(data, MAX_MANIFEST_BYTES), "manifest")
            reader.text("format", 32, _FORMAT)
            files = tuple(_read_file_record(item) for item in reader.sections("files", MAX_FILES))
            tensors = tuple(
                _read_tensor_record(item) for item in reader.sections("tensors", MAX_TENSORS)
            )
            reader.finish()
        except DocumentError as error:
            raise MalformedInput(str(error)) from None
        manifest = cls(files, tensors)
        _check_consistent(manifest)
        if manifest.to_bytes() != data:
            raise MalformedInput("manifest: expected the canonical encoding, found another one")
        return manifest

    def file(self, name: str) -> ManifestFile:
        """The record of one file; raises FileNotInManifest."""
        for file in self.files:
            if file.name == name:
                return file
        raise FileNotInManifest(f"{name[:200]!r}: expected a file of the manifest, found none such")


def _file_document(file: ManifestFile) -> dict[str, Encodable]:
    return {
        "name": file.name,
        "size": file.size,
        "sha256": file.sha256,
        "header_size": file.header_size,
        "header_sha256": file.header_sha256,
    }


def _tensor_document(tensor: TensorRecord) -> dict[str, Encodable]:
    return {
        "name": tensor.name,
        "file": tensor.file,
        "dtype": tensor.dtype,
        "shape": list(tensor.shape),
        "begin": tensor.begin,
        "end": tensor.end,
        "sha256": tensor.sha256,
    }


def _read_file_record(reader: Fields) -> ManifestFile:
    file = ManifestFile(
        name=reader.text("name", 200, _NAME),
        size=reader.integer("size", 0, MAX_FILE_BYTES),
        sha256=reader.digest("sha256"),
        header_size=reader.integer("header_size", 0, MAX_HEADER_BYTES + 8),
        header_sha256=reader.free_text("header_sha256", 64),
    )
    reader.finish()
    return file


def _read_tensor_record(reader: Fields) -> TensorRecord:
    tensor = TensorRecord(
        name=reader.text("name", _TENSOR_NAME_LENGTH),
        file=reader.text("file", 200, _NAME),
        dtype=reader.text("dtype", 16),
        shape=reader.integers("shape", MAX_DIMENSIONS, 0, MAX_FILE_BYTES),
        begin=reader.integer("begin", 0, MAX_FILE_BYTES),
        end=reader.integer("end", 0, MAX_FILE_BYTES),
        sha256=reader.digest("sha256"),
    )
    reader.finish()
    return tensor


def _check_consistent(manifest: Manifest) -> None:
    """Checks order, uniqueness, and that the tensors of each file cover it without gaps."""
    names = [file.name for file in manifest.files]
    if names != sorted(set(names)):
        raise MalformedInput("manifest.files: expected names sorted, none twice")
    tensor_names = [tensor.name for tensor in manifest.tensors]
    if tensor_names != sorted(set(tensor_names)):
        raise MalformedInput("manifest.tensors: expected names sorted, none twice")
    by_file: dict[str, list[TensorRecord]] = {f.name: [] for f in manifest.files}
    for tensor in manifest.tensors:
        if tensor.file not in by_file:
            raise MalformedInput(f"manifest: {tensor.name!r} is in {tensor.file!r}, not listed")
        by_file[tensor.file].append(tensor)
    for file in manifest.files:
        if not file.is_safetensors:
            if by_file[file.name] or file.header_sha256:
                raise MalformedInput(f"manifest: {file.name!r} is plain but has tensors or header")
            continue
        if len(file.header_sha256) != 64:
            raise MalformedInput(f"manifest: {file.name!r} lacks its header's digest")
        try:
            _check_layout(file.name, by_file[file.name], file.size - file.header_size)
        except MalformedSafetensors as error:
            raise MalformedInput(f"manifest: {error}") from None


def _check_layout(file: str, tensors: list[TensorRecord], data_size: int) -> list[TensorRecord]:
    """Checks types, sizes and that tensors cover the data part; returns them in file order."""
    ordered = sorted(tensors, key=lambda tensor: (tensor.begin, tensor.end))
    position = 0
    for tensor in ordered:
        if tensor.dtype not in DTYPE_BYTES:
            raise MalformedSafetensors(
                f"{file}: {tensor.name[:100]!r}: expected a dtype of {', '.join(DTYPE_BYTES)}, "
                f"found {tensor.dtype[:16]!r}"
            )
        if tensor.begin != position:
            kind = "an overlap" if tensor.begin < position else "a gap"
            raise MalformedSafetensors(
                f"{file}: {tensor.name[:100]!r}: expected to begin at {position}, "
                f"found {tensor.begin} ({kind})"
            )
        size = math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]
        if tensor.end - tensor.begin != size:
            raise MalformedSafetensors(
                f"{file}: {tensor.name[:100]!r}: expected {size} bytes for its shape and dtype, "
                f"found {tensor.end - tensor.begin}"
            )
        position = tensor.end
    if position != data_size:
        raise MalformedSafetensors(
            f"{file}: expected tensors to end at byte {data_size} of the data, found {position}"
        )
    return ordered


# -- opening files -----------------------------------------------------------------------------


class _OpenFile:
    """A regular file of a model directory, read with pread only."""

    def __init__(self, directory: Path, name: str) -> None:
        self.name = name
        path = _safe_path(directory, name)
        try:
            # O_NONBLOCK: opening a FIFO must not hang before fstat can refuse it.
            flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK
            self._descriptor = os.open(path, flags)
        except FileNotFoundError:
            raise ManifestMismatch(name, "a file", "no such file") from None
        except OSError as error:
            raise UnsafeFile(f"{name}: could not be opened: {error.strerror}") from None
        status = os.fstat(self._descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(self._descriptor)
            raise UnsafeFile(f"{name}: expected a regular file, found another kind")
        self.size = status.st_size

    def __enter__(self) -> _OpenFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the descriptor."""
        os.close(self._descriptor)

    def read(self, offset: int, length: int) -> bytearray:
        """Exactly `length` bytes from `offset`; raises ManifestMismatch if the file is shorter."""
        buffer = bytearray(length)
        self.read_into(memoryview(buffer), offset)
        return buffer

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fills the view from `offset`; raises ManifestMismatch if the file is shorter."""
        length = len(view)
        done = 0
        while done < length:
            count = os.preadv(self._descriptor, [view[done : done + (1 << 30)]], offset + done)
            if count == 0:
                raise ManifestMismatch(
                    self.name, f"{offset + length} bytes", f"the end at {offset + done}"
                )
            done += count


def _safe_path(directory: Path, name: str) -> Path:
    """Where to open a file without following links, except within a Hugging Face hub cache.

    There, ``snapshots/<revision>/<file>`` is a link to ``../../blobs/<digest>``; such a link is
    resolved when it leads to that very directory. What is read is hashed in any case.

    Raises:
        UnsafeFile: the name is not a plain file name, or a link that leads elsewhere.
    """
    if re.fullmatch(_NAME, name) is None:
        raise UnsafeFile(f"{name[:200]!r}: expected a plain file name")
    path = directory / name
    if not path.is_symlink():
        return path
    real_directory = directory.resolve()
    blobs = real_directory.parent.parent / "blobs"
    target = path.resolve()
    if real_directory.parent.name == "snapshots" and target.parent == blobs:
        return target
    raise UnsafeFile(
        f"{name}: expected a regular file, found a link out of the directory; copy the file there"
    )


# -- building ----------------------------------------------------------------------------------


def build_manifest(model_dir: Path) -> Manifest:
    """Hashes a model's directory; run where the files are trusted, before signing.

    Hidden files, sub-directories, documentation, licences, Python code, pickles and weights in
    formats other than safetensors are left out, and so can never be read by a shard.

    Args:
        model_dir: directory with config.json, tokenizer files and \\*.safetensors.

    Raises:
        PickleOnlyCheckpoint: the only weights are pickles.
        NoCheckpoint: no config.json or no weights.
        UnsafeFile: a file to be listed is a link out of the directory or not a regular file.
        MalformedSafetensors: a weight file breaks its format, or two hold the same tensor.
    """
    names, pickles = _listed_names(model_dir)
    if not any(name.endswith(".safetensors") for name in names):
        if pickles:
            raise PickleOnlyCheckpoint(
                f"{model_dir}: expected *.safetensors, found only {', '.join(pickles[:4])}; "
                "pickles run code when they are opened. Convert once, in a place you trust: "
                "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR, "
                "safe_serialization=True), and copy the tokenizer's files"
            )
        raise NoCheckpoint(f"{model_dir}: expected *.safetensors files, found none")
    if "config.json" not in names:
        raise NoCheckpoint(f"{model_dir}: expected a config.json, found none")
    if len(names) > MAX_FILES:
        raise NoCheckpoint(f"{model_dir}: expected at most {MAX_FILES} files, found {len(names)}")
    # hashlib releases the GIL, so that files are hashed on several cores.
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        hashed = list(pool.map(lambda name: _hash_file(model_dir, name), names))
    tensors: dict[str, TensorRecord] = {}
    for _, found in hashed:
        for tensor in found:
            if tensor.name in tensors:
                raise MalformedSafetensors(
                    f"{tensor.file}: {tensor.name[:100]!r} is also in {tensors[tensor.name].file}; "
                    "remove one of the two checkpoints"
                )
            tensors[tensor.name] = tensor
    if len(tensors) > MAX_TENSORS:
        raise NoCheckpoint(f"{model_dir}: expected at most {MAX_TENSORS} tensors")
    return Manifest(
        tuple(file for file, _ in hashed), tuple(tensors[name] for name in sorted(tensors))
    )


def _listed_names(model_dir: Path) -> tuple[list[str], list[str]]:
    """Names of the files that belong into a manifest, and of the pickles, both sorted."""
    names: list[str] = []
    pickles: list[str] = []
    try:
        entries = sorted(entry.name for entry in os.scandir(model_dir) if not entry.is_dir())
    except OSError as error:
        raise NoCheckpoint(f"{model_dir}: could not be listed: {error.strerror}") from None
    for name in entries:
        if name.startswith(".") or _IGNORED.fullmatch(name) or _OTHER_WEIGHTS.fullmatch(name):
            continue
        if _PICKLE.fullmatch(name):
            pickles.append(name)
        else:
            names.append(name)
    return names, pickles


def _hash_file(model_dir: Path, name: str) -> tuple[ManifestFile, list[TensorRecord]]:
    with _OpenFile(model_dir, name) as file:
        if name.endswith(".safetensors"):
            return _hash_safetensors(file)
        if file.size > MAX_PLAIN_FILE_BYTES:
            raise UnsafeFile(
                f"{name}: expected at most {MAX_PLAIN_FILE_BYTES} bytes for a file that is not "
                f"safetensors, found {file.size}; remove it if the model does not need it"
            )
        whole = hashlib.sha256()
        for offset in range(0, file.size, _CHUNK):
            whole.update(file.read(offset, min(_CHUNK, file.size - offset)))
        return ManifestFile(name, file.size, whole.hexdigest()), []


def _hash_safetensors(file: _OpenFile) -> tuple[ManifestFile, list[TensorRecord]]:
    """One pass over the file: header, then each tensor, into its own digest and the file's."""
    header = _read_header(file)
    whole = hashlib.sha256(header)
    tensors: list[TensorRecord] = []
    layout = _check_layout(file.name, _parse_header(file.name, header[8:]), file.size - len(header))
    for tensor in layout:
        own = hashlib.sha256()
        for offset in range(tensor.begin, tensor.end, _CHUNK):
            chunk = file.read(len(header) + offset, min(_CHUNK, tensor.end - offset))
            own.update(chunk)
            whole.update(chunk)
        tensors.append(replace(tensor, sha256=own.hexdigest()))
    record = ManifestFile(
        file.name,
        file.size,
        whole.hexdigest(),
        len(header),
        hashlib.sha256(header).hexdigest(),
    )
    return record, tensors


def _read_header(file: _OpenFile) -> bytes:
    """The length field and the header of a safetensors file, its length checked first."""
    if file.size < 8:
        raise MalformedSafetensors(f"{file.name}: expected a header, found {file.size} bytes")
    length = int.from_bytes(file.read(0, 8), "little")
    limit = min(MAX_HEADER_BYTES, file.size - 8)
    if not 2 <= length <= limit:
        raise MalformedSafetensors(
            f"{file.name}: expected a header of 2 to {limit} bytes, found {length}"
        )
    return bytes(file.read(0, 8 + length))


def _parse_header(file: str, header: bytes) -> list[TensorRecord]:
    """The tensors that a safetensors header lists, without digests and not yet checked."""
    tensors: list[TensorRecord] = []
    try:
        document = decode(header, MAX_HEADER_BYTES)
        document.pop("__metadata__", None)
        reader = Fields.of(document, file)
        for name in document:
            if not 1 <= len(name) <= _TENSOR_NAME_LENGTH:
                raise DocumentError(
                    f"{file}: expected tensor names of 1 to {_TENSOR_NAME_LENGTH} characters"
                )
            entry = reader.section(name)
            offsets = entry.integers("data_offsets", 2, 0, MAX_FILE_BYTES)
            if len(offsets) != 2 or offsets[0] > offsets[1]:
                entry.fail("data_offsets", "two offsets, ascending", list(offsets))
            tensors.append(
                TensorRecord(
                    name=name,
                    file=file,
                    dtype=entry.text("dtype", 16),
                    shape=entry.integers("shape", MAX_DIMENSIONS, 0, MAX_FILE_BYTES),
                    begin=offsets[0],
                    end=offsets[1],
                    sha256=_ABSENT,
                )
            )
            entry.finish()
    except DocumentError as error:
        raise MalformedSafetensors(f"{file}: header: {error}") from None
    return tensors


# -- observing ---------------------------------------------------------------------------------


def observe_manifest(model_dir: Path, manifest: Manifest) -> tuple[str, list[str]]:
    """What a shard finds in its own directory, as a digest to put into its evidence.

    Plain files are hashed whole; of safetensors files the header is hashed and the size compared
    (their tensors are checked when they are read). If all is as signed the digest is the
    manifest's; otherwise it is the digest of the manifest with the found values in place.

    Args:
        model_dir: the model's directory on this machine.
        manifest: the signed manifest.

    Returns:
        The observed digest (hex) and one note for each file that differs, naming it with what was
        expected and found. Files that the manifest does not list are never read and not reported.
    """
    notes: list[str] = []

    def observe(expected: ManifestFile) -> ManifestFile:
        found, note = _observe_file(model_dir, expected)
        if note:
            notes.append(f"{expected.name}: {note}")
        return found

    found = tuple(observe(file) for file in manifest.files)
    if not notes:
        return manifest.digest, []
    return replace(manifest, files=found).digest, notes


def _observe_file(model_dir: Path, expected: ManifestFile) -> tuple[ManifestFile, str]:
    absent = ManifestFile(expected.name, 0, _ABSENT)
    try:
        with _OpenFile(model_dir, expected.name) as file:
            if file.size != expected.size:
                found = replace(expected, size=file.size, sha256=_ABSENT)
                detail = f"expected {expected.size} bytes, found {file.size}"
                if not expected.is_safetensors and file.size <= MAX_PLAIN_FILE_BYTES:
                    own = hashlib.sha256(file.read(0, file.size)).hexdigest()
                    found = replace(found, sha256=own)
                    detail = f"expected sha256 {expected.sha256}, found {own}"
                return found, detail
            if expected.is_safetensors:
                own = hashlib.sha256(file.read(0, expected.header_size)).hexdigest()
                if own == expected.header_sha256:
                    return expected, ""
                return (
                    replace(expected, header_sha256=own, sha256=_ABSENT),
                    f"expected header sha256 {expected.header_sha256}, found {own}",
                )
            own = hashlib.sha256(file.read(0, file.size)).hexdigest()
            if own == expected.sha256:
                return expected, ""
            found = replace(expected, sha256=own)
            return found, f"expected sha256 {expected.sha256}, found {own}"
    except ManifestMismatch as error:
        return absent, f"expected {error.expected}, found {error.found}"
    except UnsafeFile as error:
        return absent, str(error)


# -- reading -----------------------------------------------------------------------------------


class ModelFiles:
    """Reads a model's directory, handing out only bytes that match the signed manifest.

    Safe to use from several threads. Descriptors of weight files stay open until `close`.

    Attributes:
        directory: where the files are; whoever opens it for itself checks nothing.
        manifest: the signed manifest.
    """

    def __init__(self, model_dir: Path, manifest: Manifest) -> None:
        self.directory = model_dir
        self._files = {file.name: file for file in manifest.files}
        self._tensors = {tensor.name: tensor for tensor in manifest.tensors}
        self._open: dict[str, _OpenFile] = {}
        self._lock = threading.Lock()
        self.manifest = manifest

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the weight files."""
        with self._lock:
            for file in self._open.values():
                file.close()
            self._open.clear()

    def file_names(self) -> tuple[str, ...]:
        """Names of the plain files, sorted."""
        return tuple(name for name, file in self._files.items() if not file.is_safetensors)

    def has_file(self, name: str) -> bool:
        """Whether the manifest lists a plain file of that name."""
        return name in self._files and not self._files[name].is_safetensors

    def read_file(self, name: str) -> bytes:
        """A plain file's content: read once into memory, hashed there, returned.

        Raises:
            FileNotInManifest: the manifest lists no plain file of that name.
            ManifestMismatch: the content differs from the manifest.
            UnsafeFile: the file is a link out of the directory or not a regular file.
        """
        if not self.has_file(name):
            raise FileNotInManifest(
                f"{name[:200]!r}: expected a plain file of the manifest, found none such"
            )
        expected = self._files[name]
        with _OpenFile(self.directory, name) as file:
            if file.size != expected.size or file.size > MAX_PLAIN_FILE_BYTES:
                raise ManifestMismatch(name, f"{expected.size} bytes", f"{file.size}")
            content = bytes(file.read(0, file.size))
        _check_digest(name, expected.sha256, content)
        return content

    def tensor_names(self) -> tuple[str, ...]:
        """Names of all tensors, sorted."""
        return tuple(self._tensors)

    def tensor_info(self, name: str) -> TensorRecord:
        """What the manifest says of one tensor; raises FileNotInManifest."""
        if name not in self._tensors:
            raise FileNotInManifest(f"{name[:200]!r}: expected a tensor of the manifest")
        return self._tensors[name]

    def read_tensor(self, name: str) -> bytearray:
        """A tensor's bytes (little-endian, row-major): read once, hashed in place, returned.

        Raises:
            FileNotInManifest: the manifest lists no such tensor.
            ManifestMismatch: the bytes differ from the manifest.
            UnsafeFile: the file is a link out of the directory or not a regular file.
        """
        info = self.tensor_info(name)
        content = self._weights(info.file).read(
            self._files[info.file].header_size + info.begin, info.size
        )
        _check_digest(f"{info.file}: {name}", info.sha256, content)
        return content

    def stream_tensor(self, name: str, piece_bytes: int) -> Iterator[memoryview]:
        """A tensor's bytes in pieces of `piece_bytes`, the last one shorter; none if it is empty.

        Each piece is valid until the next is asked for. The digest is compared after the last one,
        so nothing that came out may be used before the iterator has ended.

        Raises:
            FileNotInManifest, ManifestMismatch, UnsafeFile: as of `read_tensor`.
        """
        info = self.tensor_info(name)
        start = self._files[info.file].header_size + info.begin
        file = self._weights(info.file)
        buffer = memoryview(bytearray(min(piece_bytes, info.size)))
        own = hashlib.sha256()
        for offset in range(0, info.size, piece_bytes):
            piece = buffer[: min(piece_bytes, info.size - offset)]
            file.read_into(piece, start + offset)
            own.update(piece)
            yield piece
        if own.hexdigest() != info.sha256:
            raise ManifestMismatch(f"{info.file}: {name}", f"sha256 {info.sha256}", own.hexdigest())

    def weights_metadata(self, name: str) -> dict[str, str]:
        """The texts under `__metadata__` in the header of a safetensors file.

        Raises:
            FileNotInManifest, ManifestMismatch, UnsafeFile: as of `read_tensor`.
            MalformedSafetensors: they are not texts.
        """
        expected = self._files.get(name)
        if expected is None or not expected.is_safetensors:
            raise FileNotInManifest(f"{name[:200]!r}: expected a safetensors file of the manifest")
        header = self._weights(name).read(0, expected.header_size)
        _check_digest(f"{name}: header", expected.header_sha256, header)
        try:
            document = decode(bytes(header[8:]), MAX_HEADER_BYTES)
            if "__metadata__" not in document:
                return {}
            texts = Fields.of(document, name).section("__metadata__")
            found = Fields.of(document, name).mapping("__metadata__")
            return {key: texts.free_text(key, MAX_METADATA_TEXT) for key in found}
        except DocumentError as error:
            raise MalformedSafetensors(f"{name}: header: {error}") from None

    def _weights(self, name: str) -> _OpenFile:
        with self._lock:
            file = self._open.get(name)
            if file is None:
                file = self._open[name] = _OpenFile(self.directory, name)
            return file


def _check_digest(where: str, expected: str, content: bytes | bytearray) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != expected:
        raise ManifestMismatch(where, f"sha256 {expected}", found)
