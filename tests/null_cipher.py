"""Links that do not encrypt, for a test that proves its wire tap can see.

There is no way to this from an argument, a file or the environment: it replaces methods, and only
files under tests/ do so. Handshakes stay real; only the records that follow them are plain.
"""

import contextlib
from collections.abc import Iterator

from security.channel.noise import TAG_BYTES, CipherState

_real_seal, _real_open = CipherState.seal_into, CipherState.open_into


def _plain_seal(self: CipherState, plaintext: bytes | bytearray | memoryview, out: memoryview):
    out[: len(plaintext)] = plaintext
    out[len(plaintext) :] = bytes(TAG_BYTES)


def _plain_open(self: CipherState, ciphertext: bytes | bytearray | memoryview, out: memoryview):
    out[:] = ciphertext[: len(ciphertext) - TAG_BYTES]


def install() -> None:
    """From now on every link of this process sends and expects plain records."""
    CipherState.seal_into, CipherState.open_into = _plain_seal, _plain_open


def remove() -> None:
    CipherState.seal_into, CipherState.open_into = _real_seal, _real_open


@contextlib.contextmanager
def installed() -> Iterator[None]:
    install()
    try:
        yield
    finally:
        remove()
