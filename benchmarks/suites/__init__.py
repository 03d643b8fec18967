"""One module per suite, each with a ``SUITE``; ``benchmarks.model.SUITES`` lists their names."""
