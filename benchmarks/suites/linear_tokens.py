"""The suite of log-probabilities from hidden states, by its name."""

from benchmarks.suites.tokens import LINEAR as SUITE

__all__ = ["SUITE"]
