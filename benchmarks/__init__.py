"""Measurements: what the product reaches, beside what others reach on the same machine.

The modules that peers' drivers import (`benchmarks.drivers.protocol`, `benchmarks.times`) need
nothing beyond the standard library, because they run in the peers' own virtual environments.
"""
