"""Losses of logits whose vocabulary is sharded: every rank of a process group has some of the columns.

A rank runs the kernels on its own columns, in phases: what its rows have to tell, a reduction over the ranks, and the
gradient. Numbers per row travel, never anything of the size of the vocabulary. Results are the same on all ranks, to
the last bit.
"""
