"""Nonces: each for one answer, by one role of one instance, within a minute.

They live in memory only, so that none from before a restart is honoured.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from security.errors import (
    NonceExpired,
    NonceForOtherInstance,
    NonceForOtherRole,
    NonceUnknown,
    NonceUsed,
    TooManyNonces,
)

NONCE_BYTES = 32
NONCE_LIFETIME_S = 60.0
MAX_NONCES = 4096
MAX_NONCES_PER_PEER = 64


@dataclass(slots=True)
class _Nonce:
    instance: str
    role: str
    peer: str
    expires_at: float
    used: bool = False


class Nonces:
    """The nonces of one broker; used under its lock.

    Args:
        clock: seconds.
        random: gives that many random bytes.
    """

    def __init__(self, clock: Callable[[], float], random: Callable[[int], bytes]) -> None:
        self._clock = clock
        self._random = random
        self._issued: dict[bytes, _Nonce] = {}

    def issue(self, instance: str, role: str, peer: str) -> bytes:
        """A fresh nonce; the oldest of a peer that asks too often makes room.

        Raises:
            TooManyNonces
        """
        self._make_room(peer)
        nonce = self._random(NONCE_BYTES)
        self._issued[nonce] = _Nonce(instance, role, peer, self._clock() + NONCE_LIFETIME_S)
        return nonce

    def _make_room(self, peer: str) -> None:
        # Spent nonces are remembered for one more lifetime, to tell "used" and "expired" from
        # "unknown"; dictionaries keep the order of insertion, so the first is the oldest.
        now = self._clock()
        for nonce in [n for n, s in self._issued.items() if now > s.expires_at + NONCE_LIFETIME_S]:
            del self._issued[nonce]
        of_peer = [n for n, s in self._issued.items() if s.peer == peer]
        if len(of_peer) >= MAX_NONCES_PER_PEER:
            del self._issued[of_peer[0]]
        if len(self._issued) >= MAX_NONCES:
            raise TooManyNonces(
                f"challenges: expected at most {MAX_NONCES} outstanding; try again in a minute"
            )

    def spend(self, nonce: bytes, instance: str, role: str) -> None:
        """Uses a nonce up, whether or not it is good for what it is shown for.

        Raises:
            NonceUnknown, NonceUsed, NonceExpired, NonceForOtherInstance, NonceForOtherRole
        """
        found = self._issued.get(nonce)
        if found is None:
            raise NonceUnknown("nonce: expected one that this broker issued; ask for a challenge")
        used, found.used = found.used, True
        if used:
            raise NonceUsed("nonce: expected an unused one; ask for a new challenge")
        if self._clock() > found.expires_at:
            raise NonceExpired(
                f"nonce: expected one of the last {NONCE_LIFETIME_S:.0f} s; ask for a new challenge"
            )
        if found.instance != instance:
            raise NonceForOtherInstance(
                f"nonce: expected one for instance {instance}, found one for {found.instance}"
            )
        if found.role != role:
            raise NonceForOtherRole(
                f"nonce: expected one for role {role}, found one for {found.role}"
            )

    def clear(self) -> None:
        """Forgets all of them."""
        self._issued.clear()
