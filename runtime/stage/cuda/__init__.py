"""Computes the layers of a stage on a GPU.

Plain torch throughout: an attested node has no compiler, so nothing is compiled at run time. Every
class works on any torch device; on "cpu", where there are no graphs, the tests hold it to the
model. On a GPU itself the following has not been run: the capture of graphs, pinned copies, and
`varlen_attn` with the kernels behind it.
"""
