"""How one tensor is encrypted: AES-256-GCM in chunks, as STREAM has it.

    unit key (32 random bytes)
      | HKDF-SHA256, info = context: format, sealing id, unit, name, dtype, shape
      v
    tensor key:  chunk 0 | tag | chunk 1 | tag | ... | last chunk | tag

A chunk is 1 MiB of plaintext, the last one what is left; an empty tensor is one empty chunk. The
nonce is seven zero bytes, the chunk's number (u32) and 1 for the last chunk, else 0; the associated
data are the context's SHA-256, the chunk's number and how many there are. So a chunk opens in its
own place of its own tensor only, and an end that is missing is found (Hoang, Reyhanitabar, Rogaway,
Vizar: Online Authenticated-Encryption and its Nonce-Reuse Misuse-Resistance, CRYPTO 2015). No key
and nonce meet twice: a tensor key is used for one tensor of one sealing.
"""

from __future__ import annotations

import hashlib
import hmac
import math
import struct
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from security.errors import SealedChunkInvalid
from security.manifest import DTYPE_BYTES
from security.sealing.document import SealedTensor
from security.signing import length_prefixed

CHUNK_BYTES: Final = 1 << 20
TAG_BYTES: Final = 16
KEY_BYTES: Final = 32

_CONTEXT: Final = b"bulkhead/v1/sealed-tensor"
_COMMITMENT: Final = b"bulkhead/v1/sealed-unit"
_NONCE: Final = struct.Struct(">7xIB")
_PLACE: Final = struct.Struct(">QQ")


class TensorCipher:
    """Seals and opens the chunks of one tensor; safe to use from several threads.

    Attributes:
        plain_bytes: of the whole tensor.
        sealed_bytes: of the whole tensor.
        chunks: how many there are.
    """

    def __init__(self, unit_key: bytes, sealing_id: bytes, tensor: SealedTensor) -> None:
        context = length_prefixed(
            [
                _CONTEXT,
                sealing_id,
                tensor.unit.encode(),
                tensor.name.encode(),
                tensor.dtype.encode(),
                struct.pack(f">{len(tensor.shape)}Q", *tensor.shape),
            ]
        )
        key = HKDF(hashes.SHA256(), KEY_BYTES, salt=None, info=context).derive(unit_key)
        self._aead = AESGCM(key)
        self._context = hashlib.sha256(context).digest()
        self._name = tensor.name
        self.plain_bytes = plain_bytes(tensor)
        self.sealed_bytes = sealed_bytes(tensor)
        self.chunks = _chunks(self.plain_bytes)

    def seal(self, index: int, plain: memoryview | bytes) -> bytes:
        """Chunk `index` with its tag; `plain` is as long as `plain_span` says."""
        begin, end = self.plain_span(index)
        if len(plain) != end - begin:
            raise ValueError(f"chunk {index}: expected {end - begin} bytes, found {len(plain)}")
        return self._aead.encrypt(self._nonce(index), plain, self._associated(index))

    def open_into(self, index: int, sealed: memoryview, plain: memoryview) -> None:
        """Opens chunk `index` into memory that is as long as `plain_span` says.

        Raises:
            SealedChunkInvalid: it is not this chunk of this tensor; `plain` holds nothing of use.
        """
        begin, end = self.plain_span(index)
        if len(sealed) != end - begin + TAG_BYTES:
            raise SealedChunkInvalid(
                f"tensor {self._name}: chunk {index}: expected {end - begin + TAG_BYTES} bytes, "
                f"found {len(sealed)}"
            )
        try:
            self._aead.decrypt_into(self._nonce(index), sealed, self._associated(index), plain)
        except InvalidTag:
            raise SealedChunkInvalid(
                f"tensor {self._name}: chunk {index} of {self.chunks}: expected the one that was "
                "sealed there, found a changed or another one; nothing of the tensor is used. "
                "Copy the sealed checkpoint anew"
            ) from None

    def plain_span(self, index: int) -> tuple[int, int]:
        """First byte of a chunk in the opened tensor, and the one after its last."""
        begin = index * CHUNK_BYTES
        return begin, min(begin + CHUNK_BYTES, self.plain_bytes)

    def _nonce(self, index: int) -> bytes:
        return _NONCE.pack(index, index == self.chunks - 1)

    def _associated(self, index: int) -> bytes:
        return self._context + _PLACE.pack(index, self.chunks)


def commitment(unit_key: bytes, sealing_id: bytes, unit: str) -> bytes:
    """What `sealing.json` says of a unit's key: only that key gives it, and it gives nothing away.

    AES-GCM alone does not commit to a key; this does, under the owner's signed manifest.
    """
    message = length_prefixed([_COMMITMENT, sealing_id, unit.encode()])
    return hmac.digest(unit_key, message, hashlib.sha256)


def plain_bytes(tensor: SealedTensor) -> int:
    """Bytes of a tensor when opened."""
    return math.prod(tensor.shape) * DTYPE_BYTES[tensor.dtype]


def sealed_bytes(tensor: SealedTensor) -> int:
    """Bytes of a tensor as stored."""
    plain = plain_bytes(tensor)
    return plain + _chunks(plain) * TAG_BYTES


def _chunks(plain: int) -> int:
    return max(1, -(-plain // CHUNK_BYTES))
