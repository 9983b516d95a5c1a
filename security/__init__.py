"""Proves: signatures, manifest, evidence, key broker, rosters, encrypted links and envelopes.

Imports of `placement` are of its trusted half only; nothing here knows torch or Ray. Import names
from the modules that define them: most users need one or two, and a shard starts faster.
"""
