"""Computes one stage of a decoder: a contiguous range of layers over a paged cache.

Letters used as shape suffixes in this package:

    T  tokens (rows) of a step             S  sequences of a step or of a group
    D  hidden size                         H  query heads
    K  key-value heads                     G  query heads per key-value head
    E  elements of one head                L  key positions, padded to whole blocks
    N  cache blocks                        P  positions in a block
    B  blocks of a block table             V  vocabulary
"""
