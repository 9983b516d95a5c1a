"""Serves: the relay in Ray Serve, the client's side of it, and the command line.

Nothing here is trusted with a prompt that the policy wants sealed: the relay moves bytes between a
client and the head shard. No module of this package imports torch or transformers.
"""
