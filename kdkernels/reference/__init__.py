"""Plain PyTorch in textbook form: the oracle of the tests and the "torch" backend. No tricks, fp64-capable."""

from kdkernels.reference.capture import capture_rows, sample_rows
from kdkernels.reference.dense import dense_rows, dkd_rows, mse_rows
from kdkernels.reference.order import topp_rows, uld_rows
from kdkernels.reference.tokens import TokenRows, token_gradient, token_rows
from kdkernels.reference.topk import topk_rows

__all__ = [
    "TokenRows",
    "capture_rows",
    "dense_rows",
    "dkd_rows",
    "mse_rows",
    "sample_rows",
    "token_gradient",
    "token_rows",
    "topk_rows",
    "topp_rows",
    "uld_rows",
]
