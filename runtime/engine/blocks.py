"""Cache blocks: one id space that every stage mirrors."""

from __future__ import annotations

__all__ = ["BlockAllocator"]


class BlockAllocator:
    """Hands out block ids 0 to `blocks` - 1, each holding `block_size` positions.

    Whoever allocates ids owns them until it frees them. Freed ids may be handed out at once: steps
    pass every stage in order, so that what an older step still writes is written before a newer
    owner of the block writes or reads.
    """

    def __init__(self, blocks: int, block_size: int) -> None:
        if blocks < 1 or block_size < 1:
            raise ValueError(
                f"cache: expected at least one block of one position, found {blocks} blocks of "
                f"{block_size}"
            )
        self.blocks = blocks
        self.block_size = block_size
        self._free = list(range(blocks - 1, -1, -1))
        self._owned = bytearray(blocks)

    @property
    def free(self) -> int:
        """Blocks that nobody owns."""
        return len(self._free)

    def needed(self, positions: int) -> int:
        """Blocks that hold so many positions."""
        return -(-positions // self.block_size)

    def allocate(self, count: int) -> list[int]:
        """Takes `count` blocks; there must be as many (see `free`)."""
        assert 0 <= count <= len(self._free), "the scheduler asks only for what is free"
        taken = [self._free.pop() for _ in range(count)]
        for block in taken:
            self._owned[block] = 1
        return taken

    def release(self, blocks: list[int]) -> None:
        """Gives blocks back and empties the list, so that they cannot be given back twice."""
        for block in blocks:
            assert self._owned[block], "a block is freed once, by its owner"
            self._owned[block] = 0
        self._free.extend(reversed(blocks))
        blocks.clear()
