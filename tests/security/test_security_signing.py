from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given
from hypothesis import strategies as st

from security.errors import KeyFileError, MalformedInput, SignatureInvalid, WrongDocumentKind
from security.signing import (
    SignedDocument,
    create_key_file,
    length_prefixed,
    load_key_file,
    load_public_key,
    open_signed,
    public_bytes,
    sign,
    write_public_key,
)

KEY = Ed25519PrivateKey.from_private_bytes(b"\x07" * 32)
PUBLIC = public_bytes(KEY)


def test_round_trip() -> None:
    document = sign("policy", b"payload", KEY)
    assert open_signed("policy", document.to_bytes(), PUBLIC) == b"payload"
    assert SignedDocument.from_bytes(document.to_bytes()) == document


def test_every_changed_byte_is_refused() -> None:
    data = sign("policy", b"payload", KEY).to_bytes()
    # Bytes 9 to 41 are the signer's key, a hint that verification ignores on purpose.
    for position in (*range(9), *range(41, len(data))):
        changed = bytearray(data)
        changed[position] ^= 1
        with pytest.raises((MalformedInput, SignatureInvalid, WrongDocumentKind)):
            open_signed("policy", bytes(changed), PUBLIC)


def test_kind_is_signed() -> None:
    document = sign("policy", b"payload", KEY)
    with pytest.raises(WrongDocumentKind):
        open_signed("template", document, PUBLIC)
    relabelled = SignedDocument("template", document.payload, document.signature, document.key)
    with pytest.raises(SignatureInvalid):
        open_signed("template", relabelled, PUBLIC)


def test_key_of_the_document_is_not_believed() -> None:
    other = Ed25519PrivateKey.generate()
    with pytest.raises(SignatureInvalid):
        open_signed("policy", sign("policy", b"payload", other), PUBLIC)


@given(st.binary(max_size=300))
def test_parser_never_fails_otherwise(data: bytes) -> None:
    with pytest.raises(MalformedInput):
        SignedDocument.from_bytes(b"BKHD-SD1" + data + b"!")


@given(st.lists(st.binary(max_size=8)), st.lists(st.binary(max_size=8)))
def test_length_prefix_is_injective(one: list[bytes], other: list[bytes]) -> None:
    assert (length_prefixed(one) == length_prefixed(other)) == (one == other)


def test_key_files(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    key = create_key_file(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert public_bytes(load_key_file(path)) == public_bytes(key)
    with pytest.raises(KeyFileError, match="File exists"):
        create_key_file(path)
    write_public_key(tmp_path / "owner.pub", public_bytes(key))
    assert load_public_key(tmp_path / "owner.pub") == public_bytes(key)


def test_key_file_refusals(tmp_path: Path) -> None:
    path = tmp_path / "owner.key"
    create_key_file(path)
    (tmp_path / "link").symlink_to(path)
    with pytest.raises(KeyFileError):
        load_key_file(tmp_path / "link")
    path.chmod(0o640)
    with pytest.raises(KeyFileError, match="0640"):
        load_key_file(path)
    secret = tmp_path / "odd.key"
    secret.write_text("do not quote me")
    secret.chmod(0o600)
    with pytest.raises(KeyFileError) as caught:
        load_key_file(secret)
    assert "quote" not in str(caught.value)
    with pytest.raises(KeyFileError):
        load_key_file(tmp_path / "absent")
