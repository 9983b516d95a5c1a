"""Shard to shard: the Noise handshake, links of messages, and the frames inside them."""
