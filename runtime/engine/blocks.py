"""Cache blocks: one id space that every stage mirrors, and the prefixes that are still in it.

A block that a sequence has filled is published under a name that stands for its tenant and every
token up to its end. A later sequence of the same tenant that begins with the same tokens takes the
block over instead of computing it (the idea of vLLM's automatic prefix caching; the chain of
hashes, and why it needs a salt, in "Auditing Prompt Caching in Language Model APIs", ICML '25).
Sequences all of whose rows are long (see `RotaryBorder`) have names of their own.

Names begin with a keyed hash of the tenant under a secret of this process: no tenant can find, or
measure the absence of, what another has asked.
"""

from __future__ import annotations

import hashlib
import secrets
import struct
from collections.abc import Callable
from collections.abc import Sequence as Many

__all__ = ["BlockAllocator", "PrefixNames"]

_NAME_BYTES = 32
_LONG = b"long"


class PrefixNames:
    """Names full blocks: BLAKE2b over the name of the block before and the block's token ids.

    Args:
        block_size: positions of a block.
        secret: at most 64 bytes; by default drawn at random, so that names mean nothing elsewhere.
    """

    def __init__(self, block_size: int, secret: bytes | None = None) -> None:
        self._block_size = block_size
        self._secret = secrets.token_bytes(_NAME_BYTES) if secret is None else secret
        self._ids = struct.Struct(f"<{block_size}I")

    def extend(
        self,
        names: list[bytes],
        count: int,
        tenant: bytes,
        tokens: Callable[[int, int], list[int]],
        *,
        long: bool = False,
    ) -> None:
        """Appends the missing ones of the first `count` names.

        Args:
            names: of the sequence's first blocks; only the missing ones are computed.
            count: full blocks that are to have a name.
            tenant: whose sequence it is.
            tokens: the token ids of positions (start, number of positions).
            long: whether all its rows are long: keys of the same tokens are then others.
        """
        while len(names) < count:
            before = names[-1] if names else self._root(tenant, long)
            ids = self._ids.pack(*tokens(len(names) * self._block_size, self._block_size))
            names.append(hashlib.blake2b(before + ids, digest_size=_NAME_BYTES).digest())

    def _root(self, tenant: bytes, long: bool) -> bytes:
        kind = _LONG if long else b""
        return hashlib.blake2b(
            tenant, digest_size=_NAME_BYTES, key=self._secret, person=kind
        ).digest()


class BlockAllocator:
    """Hands out block ids 0 to `blocks` - 1, each holding `block_size` positions.

    Whoever allocates or shares ids holds them until it releases them. A block is written by the one
    sequence that allocated it, and only until it is published; from then on it may be shared and is
    read only. What nobody holds any more is free; a published block stays findable until its place
    is needed, longest unused first.

    Freed ids may be handed out at once: steps pass every stage in order, so that what an older step
    still writes or reads is done before a newer owner of the block writes.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(
                f"cache: expected at least one block of one position, found {blocks} blocks of "
                f"{block_size}"
            )
        self.blocks = blocks
        self.block_size = block_size
        self._empty = list(range(blocks - 1, -1, -1))
        # Published blocks that nobody holds; a dict keeps the order in which they were let go.
        self._unused: dict[int, None] = {}
        self._holders = [0] * blocks
        self._names: list[bytes | None] = [None] * blocks
        self._published: dict[bytes, int] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._empty) + len(self._unused)

    def needed(self, positions: int) -> int:
        """Blocks that hold so many positions."""
        return -(-positions // self.block_size)

    def find(self, names: Many[bytes]) -> list[int]:
        """The published blocks of the longest prefix of `names`; they are not held yet."""
        found: list[int] = []
        for name in names:
            block = self._published.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def free_besides(self, found: Many[int]) -> int:
        """Blocks that `allocate` can still hand out once those found are shared."""
        return self.free - sum(self._holders[block] == 0 for block in found)

    def share(self, found: Many[int]) -> list[int]:
        """Holds published blocks, for reading; `found` as `find` returned it a moment ago."""
        for block in found:
            assert self._names[block] is not None, "only published blocks are shared"
            if self._holders[block] == 0:
                del self._unused[block]
            self._holders[block] += 1
        return list(found)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks to write to; there must be as many (see `free`)."""
        assert 0 <= count <= self.free, "the scheduler asks only for what is free"
        taken = [self._empty.pop() if self._empty else self._evict() for _ in range(count)]
        for block in taken:
            self._holders[block] = 1
        return taken

    def publish(self, block: int, name: bytes) -> None:
        """Says what a held block contains, now that it is full and computed in every stage.

        Where another block is known under the name, this one stays private to its owner.
        """
        assert self._holders[block] == 1 and self._names[block] is None, (
            "published once, by its owner"
        )
        if name not in self._published:
            self._published[name] = block
            self._names[block] = name

    def release(self, blocks: list[int]) -> None:
        """Gives blocks back and empties the list, so that they cannot be given back twice."""
        # The last first: the beginning of a prefix is of use to more than its end.
        for block in reversed(blocks):
            assert self._holders[block] > 0, "a block is given back by who holds it"
            self._holders[block] -= 1
            if self._holders[block] == 0:
                if self._names[block] is None:
                    self._empty.append(block)
                else:
                    self._unused[block] = None
        blocks.clear()

    def _evict(self) -> int:
        block = next(iter(self._unused))
        del self._unused[block]
        name = self._names[block]
        assert name is not None, "only published blocks are kept unused"
        del self._published[name]
        self._names[block] = None
        return block
