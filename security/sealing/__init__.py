"""Sealed checkpoints: chosen tensors encrypted, each opened only by whoever has its unit's key."""
