"""The handshake against published vectors, and what it refuses."""

import json
import os
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from security.channel.noise import (
    PROTOCOL,
    CipherState,
    KKInitiator,
    KKResponder,
    NoiseError,
)

VECTORS = Path(
    os.environ.get("BULKHEAD_VECTORS", Path(__file__).resolve().parents[3] / "shared" / "vectors")
)


def _private(text: str) -> X25519PrivateKey:
    return X25519PrivateKey.from_private_bytes(bytes.fromhex(text))


def _with_ephemeral(kind: type, ephemeral: str, *arguments: object):
    fixed = type("Fixed", (kind,), {"_new_ephemeral": lambda self: _private(ephemeral)})
    return fixed(*arguments)


def _vectors() -> list[dict]:
    path = VECTORS / "noise_kk.json"
    if not path.exists():
        return []
    vectors = json.loads(path.read_text())["vectors"]
    return [vector for vector in vectors if vector["protocol_name"] == PROTOCOL]


def test_published_vectors() -> None:
    vectors = _vectors()
    if not vectors:
        pytest.skip(f"no {PROTOCOL} vectors in {VECTORS}; set BULKHEAD_VECTORS to their directory")
    for vector in vectors:
        initiator = _with_ephemeral(
            KKInitiator,
            vector["init_ephemeral"],
            _private(vector["init_static"]),
            bytes.fromhex(vector["init_remote_static"]),
            bytes.fromhex(vector["init_prologue"]),
        )
        responder = _with_ephemeral(
            KKResponder,
            vector["resp_ephemeral"],
            _private(vector["resp_static"]),
            bytes.fromhex(vector["resp_remote_static"]),
            bytes.fromhex(vector["resp_prologue"]),
        )
        messages = [
            (bytes.fromhex(message["payload"]), bytes.fromhex(message["ciphertext"]))
            for message in vector["messages"]
        ]
        assert len(messages) > 2
        (first, first_wire), (second, second_wire), *transport = messages
        assert initiator.write_message(first) == first_wire
        assert responder.read_message(first_wire) == first
        assert responder.write_message(second) == second_wire
        assert initiator.read_message(second_wire) == second
        ends = [initiator.split(), responder.split()]
        for end in ends:
            assert end.handshake_hash.hex() == vector["handshake_hash"]
        for index, (payload, wire) in enumerate(transport):
            sender, receiver = ends[index % 2], ends[1 - index % 2]
            sealed = bytearray(len(payload) + 16)
            sender.send.seal_into(payload, memoryview(sealed))
            assert sealed == wire
            opened = bytearray(len(payload))
            receiver.receive.open_into(wire, memoryview(opened))
            assert opened == payload


def _pair(prologue: bytes = b"p", other_prologue: bytes = b"p") -> tuple[KKInitiator, KKResponder]:
    one, two = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    return (
        KKInitiator(one, two.public_key().public_bytes_raw(), prologue),
        KKResponder(two, one.public_key().public_bytes_raw(), other_prologue),
    )


def _finished():
    initiator, responder = _pair()
    responder.read_message(initiator.write_message())
    initiator.read_message(responder.write_message())
    return initiator.split(), responder.split()


def test_both_directions_have_their_own_key() -> None:
    one, two = _finished()
    assert one.handshake_hash == two.handshake_hash
    sealed = one.send.encrypt(b"", b"hello")
    with pytest.raises(NoiseError):
        one.receive.decrypt(b"", sealed)
    assert two.receive.decrypt(b"", sealed) == b"hello"
    assert one.receive.decrypt(b"", two.send.encrypt(b"", b"back")) == b"back"


def test_other_prologue_is_refused() -> None:
    initiator, responder = _pair(b"one", b"two")
    with pytest.raises(NoiseError):
        responder.read_message(initiator.write_message())


def test_other_initiator_key_is_refused() -> None:
    _, responder = _pair()
    stranger, _ = _pair()
    with pytest.raises(NoiseError):
        responder.read_message(stranger.write_message())


def test_stranger_with_the_public_keys_only_is_refused() -> None:
    owner, peer = X25519PrivateKey.generate(), X25519PrivateKey.generate()
    responder = KKResponder(peer, owner.public_key().public_bytes_raw(), b"p")
    stranger = KKInitiator(X25519PrivateKey.generate(), peer.public_key().public_bytes_raw(), b"p")
    with pytest.raises(NoiseError):
        responder.read_message(stranger.write_message())


@pytest.mark.parametrize("position", [0, 31, 32, 47])
def test_every_part_of_the_second_message_is_authentic(position: int) -> None:
    initiator, responder = _pair()
    responder.read_message(initiator.write_message())
    message = bytearray(responder.write_message())
    message[position] ^= 1
    with pytest.raises(NoiseError):
        initiator.read_message(bytes(message))


def test_short_message_and_small_order_key_are_refused() -> None:
    _, responder = _pair()
    with pytest.raises(NoiseError, match="48 bytes"):
        responder.read_message(bytes(47))
    _, responder = _pair()
    with pytest.raises(NoiseError, match="small order"):
        responder.read_message(bytes(48))


def test_messages_out_of_turn_are_refused() -> None:
    initiator, responder = _pair()
    with pytest.raises(NoiseError, match="out of turn"):
        responder.write_message()
    with pytest.raises(NoiseError, match="out of turn"):
        initiator.split()
    initiator.write_message()
    with pytest.raises(NoiseError, match="out of turn"):
        initiator.write_message()


def test_rekey_follows_the_specification() -> None:
    key = bytes(range(32))
    state = CipherState(key)
    state.encrypt(b"", b"first")
    state.rekey()
    expected = AESGCM(key).encrypt(b"\0" * 4 + b"\xff" * 8, bytes(32), b"")[:32]
    # The counter goes on: the second record has nonce 1.
    assert state.encrypt(b"", b"second") == AESGCM(expected).encrypt(
        b"\0" * 11 + b"\x01", b"second", b""
    )


def test_counter_never_wraps() -> None:
    state = CipherState(bytes(32))
    state._nonce = 2**64 - 1
    with pytest.raises(NoiseError, match="used up"):
        state.encrypt(b"", b"")
