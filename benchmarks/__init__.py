"""Benchmarks of kdkernels: ``python -m benchmarks --help``, or ``pytest benchmarks --benchmark-only``."""
