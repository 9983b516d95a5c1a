"""Runs: stages, the engine, shard processes, and Ray's side of them (`cluster`)."""
