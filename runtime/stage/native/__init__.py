"""Whole decoder layers in C++ for processors with AVX-512 (and AMX where there is one)."""
