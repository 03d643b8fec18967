"""Training scripts to copy from; the benchmark suite "training" compares the losses on their models and data."""
