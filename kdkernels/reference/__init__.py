"""Plain PyTorch in textbook form: the oracle of the tests and the "torch" backend. No tricks, fp64-capable."""

from kdkernels.reference.dense import dense_rows, dkd_rows, mse_rows
from kdkernels.reference.topk import topk_rows

__all__ = ["dense_rows", "dkd_rows", "mse_rows", "topk_rows"]
