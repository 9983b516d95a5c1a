"""Reads a sealed checkpoint: tensors are opened into memory, and nowhere else."""

from __future__ import annotations

import hmac
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from security.errors import SealedTensorMismatch, UnsealKeyMismatch, UnsealKeyMissing
from security.manifest import Manifest, ModelFiles, TensorRecord
from security.sealing.cipher import CHUNK_BYTES, TAG_BYTES, TensorCipher, commitment, sealed_bytes
from security.sealing.document import SEALING_FILE, SealedTensor, Sealing
from security.sealing.keys import UnsealKeys


class SealedModelFiles(ModelFiles):
    """`ModelFiles` of a sealed checkpoint: sealed tensors are as their owner sealed them.

    Bytes are compared with the manifest as they are stored and authenticated as they are opened;
    a tensor is handed out when all of it has passed both.

    Attributes:
        sealing: what is sealed.
        keys: that it was opened with.

    Args:
        model_dir: the model's directory.
        manifest: the signed manifest.
        keys: of the units that will be read; a missing one is refused when its tensor is read.

    Raises:
        SealingMalformed: `sealing.json` is not in its format.
        SealedTensorMismatch: a tensor is stored in another form than `sealing.json` says.
        UnsealKeyMismatch: a key is not the one that its unit was sealed with.
    """

    def __init__(self, model_dir: Path, manifest: Manifest, keys: UnsealKeys) -> None:
        super().__init__(model_dir, manifest)
        self.keys = keys
        self.sealing = Sealing.from_bytes(self.read_file(SEALING_FILE))
        self._sealed = {tensor.name: tensor for tensor in self.sealing.tensors}
        stored = {tensor.name: tensor for tensor in manifest.tensors}
        for tensor in self.sealing.tensors:
            _check_stored(tensor, stored.get(tensor.name))
        for unit, expected in self.sealing.commitments.items():
            if unit in keys and not hmac.compare_digest(
                commitment(keys[unit], self.sealing.sealing_id, unit), expected
            ):
                raise UnsealKeyMismatch(
                    f"key of {unit}: expected the one that this checkpoint was sealed with, found "
                    "another unit's or another model's"
                )

    def tensor_info(self, name: str) -> TensorRecord:
        """What the manifest says of one tensor, with shape and dtype as opened.

        Its size and digest are those of the stored bytes.
        """
        info = super().tensor_info(name)
        sealed = self._sealed.get(name)
        if sealed is None:
            return info
        return replace(info, dtype=sealed.dtype, shape=sealed.shape)

    def read_tensor(self, name: str) -> bytearray:
        """A tensor's bytes (little-endian, row-major), opened if they are sealed.

        Raises:
            FileNotInManifest, ManifestMismatch, UnsafeFile: as of `ModelFiles`.
            UnsealKeyMissing: it is sealed and its unit's key is not among the keys.
            SealedChunkInvalid: a chunk is not the one that was sealed.
        """
        sealed = self._sealed.get(name)
        if sealed is None:
            return super().read_tensor(name)
        cipher = self._cipher(sealed)
        content = bytearray(cipher.plain_bytes)
        with memoryview(content) as view:
            for index, piece in enumerate(self.stream_tensor(name, CHUNK_BYTES + TAG_BYTES)):
                begin, end = cipher.plain_span(index)
                cipher.open_into(index, piece, view[begin:end])
        return content

    def stream_opened(self, name: str) -> Iterator[memoryview]:
        """A tensor's bytes as `read_tensor` has them, a chunk at a time.

        Each chunk is valid until the next is asked for, and may be used only after the iterator
        has ended. Raises as `read_tensor`.
        """
        sealed = self._sealed.get(name)
        if sealed is None:
            yield from self.stream_tensor(name, CHUNK_BYTES)
            return
        cipher = self._cipher(sealed)
        buffer = memoryview(bytearray(min(CHUNK_BYTES, cipher.plain_bytes)))
        for index, piece in enumerate(self.stream_tensor(name, CHUNK_BYTES + TAG_BYTES)):
            begin, end = cipher.plain_span(index)
            cipher.open_into(index, piece, buffer[: end - begin])
            yield buffer[: end - begin]

    def _cipher(self, tensor: SealedTensor) -> TensorCipher:
        if tensor.unit not in self.keys:
            raise UnsealKeyMissing(
                f"tensor {tensor.name}: expected the key of {tensor.unit}, found none; "
                "the broker releases it to the stage that the plan assigns this part"
            )
        return TensorCipher(self.keys[tensor.unit], self.sealing.sealing_id, tensor)


def open_model(model_dir: Path, manifest: Manifest, keys: UnsealKeys) -> ModelFiles:
    """A model's files, sealed or not.

    Args:
        model_dir: the model's directory.
        manifest: the signed manifest.
        keys: of the units that will be read; not looked at where nothing is sealed.

    Raises:
        see `SealedModelFiles`.
    """
    if any(file.name == SEALING_FILE for file in manifest.files):
        return SealedModelFiles(model_dir, manifest, keys)
    return ModelFiles(model_dir, manifest)


def keys_of(files: ModelFiles) -> UnsealKeys:
    """The keys that a model was opened with, for processes that open it again; none if plain."""
    return files.keys if isinstance(files, SealedModelFiles) else UnsealKeys({})


def _check_stored(tensor: SealedTensor, stored: TensorRecord | None) -> None:
    expected = sealed_bytes(tensor)
    if stored is None:
        found = "no such tensor"
    elif (stored.dtype, stored.shape) != ("U8", (expected,)):
        found = f"{stored.dtype} of shape {list(stored.shape)}"
    else:
        return
    raise SealedTensorMismatch(
        f"tensor {tensor.name[:200]}: expected U8 of shape [{expected}] for a sealed "
        f"{tensor.dtype} of shape {list(tensor.shape)}, found {found}"
    )
