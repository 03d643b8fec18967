"""One call of each kernel of a backend, held against plain PyTorch in fp64: ``python tests/gpu/one_call.py --help``.

For tools that look at every access (compute-sanitizer) and for a first look at a new card. Rows are few. Prints a line
for each call: "ok NAME", "wrong NAME: WHY", or "absent NAME: WHY" for what the backend does not have.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import kdkernels as kd
from kdkernels import backends, ops

ROWS, K = 3, 33
TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
EVERYTHING = {"ce_weight": 0.5, "label_smoothing": 0.1, "z_loss_weight": 1e-3, "temperature": 2.0}


class Call(NamedTuple):
    """A call of the public function that runs the op ``pattern``; ``run(tensors, backend)`` returns its tensors."""

    name: str
    pattern: str
    columns: int
    dtype: str
    run: Callable


class Tensors(NamedTuple):
    student: torch.Tensor
    teacher: torch.Tensor
    labels: torch.Tensor
    ids: torch.Tensor
    logprobs: torch.Tensor


def make(call, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = (torch.randn(ROWS, call.columns, generator=generator) * 3 for _ in range(2))
    student, teacher = (x.to(TYPES[call.dtype]).to(device) for x in (student, teacher))
    labels = torch.randint(call.columns, (ROWS,), generator=generator)
    labels[1] = -100
    logprobs, ids = (teacher.float().cpu() * 0.5).log_softmax(-1).topk(min(K, call.columns))
    return Tensors(student, teacher, labels.to(device), ids.to(device), logprobs.to(device))


def exact(tensors):
    """The same numbers in fp64 on the CPU."""
    return Tensors(*(x.cpu().double() if x.dtype in (torch.bfloat16, torch.float16) else x.cpu() for x in tensors))


def with_gradient(student, function):
    """Values of a loss of rows, and its gradient under a grad_output that is not 1, which a kernel multiplies by."""
    leaf = student.detach().requires_grad_()
    values = function(leaf)
    values = values if isinstance(values, tuple) else (values,)
    weights = torch.linspace(-1.5, 2.0, ROWS, device=student.device, dtype=values[0].dtype)
    weights = weights.reshape(-1, *[1] * (values[0].dim() - 1))
    (gradient,) = torch.autograd.grad((values[0] * weights).sum(), leaf)
    return [*(value.detach() for value in values), gradient]


def dense(columns, dtype, divergence="forward_kl", **options):
    def run(x, backend):
        given = (x.student, x.teacher, x.labels if "ce_weight" in options else None)
        more = {"divergence": divergence, "reduction": "none", "backend": backend, **options}
        return with_gradient(given[0], lambda leaf: kd.kd_loss(leaf, *given[1:], **more))

    words = ", ".join(f"{key}" for key in options)
    name = f"kd_loss {divergence} V={columns} {dtype}{words and ' with ' + words}"
    return Call(name, "dense_fwd", columns, dtype, run)


def sparse(tail, columns, dtype, divergence="forward_kl"):
    def run(x, backend):
        more = {"tail": tail, "divergence": divergence, "reduction": "none", "backend": backend, "ce_weight": 0.5}
        return with_gradient(x.student, lambda leaf: kd.topk_kd_loss(leaf, x.ids, x.logprobs, x.labels, **more))

    return Call(f"topk_kd_loss {tail} {divergence} V={columns} {dtype}", "topk_fwd", columns, dtype, run)


def pair(name, function, pattern, columns, dtype):
    def run(x, backend):
        more = {"reduction": "none", "backend": backend}
        return with_gradient(x.student, lambda leaf: function(leaf, x.teacher, x.labels, **more))

    return Call(f"{name} V={columns} {dtype}", pattern, columns, dtype, run)


def tokens(columns, dtype):
    def run(x, backend):
        def values(leaf):
            found = kd.token_logprobs(leaf, x.ids, entropy=True, backend=backend)
            return found.logprobs, found.entropy

        return with_gradient(x.student, values)

    return Call(f"token_logprobs V={columns} {dtype}", "token_fwd", columns, dtype, run)


def gather(columns, dtype):
    def run(x, backend):
        return list(kd.gather_logprobs(x.student, x.ids, backend=backend)[1:])

    return Call(f"gather_logprobs V={columns} {dtype}", "token_fwd", columns, dtype, run)


def capture(columns, dtype):
    def run(x, backend):
        found = kd.capture_topk(x.student, min(K, columns), backend=backend)
        return [found.logprobs, found.tail_logprob]

    return Call(f"capture_topk V={columns} {dtype}", "capture_topk", columns, dtype, run)


CALLS = [
    # Several rows a block, one block, a cluster, and rows that begin between vectors.
    *(dense(columns, "bf16") for columns in (7, 1000, 1001, 8192, 32000, 50257, 128256)),
    dense(131072, "fp32"),
    dense(4097, "fp16"),
    *(dense(32000, "bf16", name) for name in ("reverse_kl", "jeffreys", "jsd", "tvd", "alpha_beta")),
    dense(131072, "bf16", "jsd"),
    dense(50257, "bf16", "jsd", **EVERYTHING),
    dense(4097, "fp32", "skew_kl", student_softcap=20.0, teacher_softcap=30.0, **EVERYTHING),
    *(sparse(tail, 50257, "bf16") for tail in ("bucket", "uniform", "renormalize", "renormalize_both", "drop")),
    sparse("bucket", 1000, "fp32", "jsd"),
    sparse("bucket", 128256, "bf16", "jsd"),
    pair("dkd_loss", kd.dkd_loss, "dkd_fwd", 4097, "bf16"),
    pair("logit_mse_loss", kd.logit_mse_loss, "mse_fwd", 4097, "bf16"),
    tokens(50257, "bf16"),
    tokens(1000, "fp32"),
    gather(50257, "bf16"),
    capture(50257, "bf16"),
    capture(1000, "fp32"),
]


def check(call, device, backend):
    """The fault of the backend's results of a call; None where there is none."""
    tensors = make(call, device)
    found = call.run(tensors, backend)
    if device != "cpu":
        torch.cuda.synchronize(device)
    eps = torch.finfo(TYPES[call.dtype]).eps
    for number, (got, want) in enumerate(zip(found, call.run(exact(tensors), "torch"), strict=True)):
        rtol = 3 * eps + 1e-4 if got.dtype == TYPES[call.dtype] else 1e-4
        try:
            torch.testing.assert_close(got.cpu().double(), want.double(), rtol=rtol, atol=1e-4 if number == 0 else 1e-5)
        except AssertionError as error:
            lines = [line for line in str(error).splitlines() if line]
            return f"result {number}: {' '.join(lines[1:3])}"
    return None


def launch(number):
    """The launches of a call in a process that only compiles them."""
    CALLS[number].run(make(CALLS[number], "cpu"), "triton")


def compile_calls(**options):
    """Compile all that Triton's kernels need for all calls, on all processors."""
    from ahead import compile_ahead

    calls = [(launch, number) for number, call in enumerate(CALLS) if "triton" not in ops.LACKING.get(call.pattern, {})]
    return compile_ahead(calls, **options)


def lacking(call, device, backend):
    """Why the backend has no kernel for a call."""
    reason = backends.BACKENDS[backend].why_not(device)
    return reason or ops.LACKING.get(call.pattern, {}).get(backend)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--backend", choices=("cuda", "triton", "cpu"), default="triton")
    parser.add_argument("--compiled", action="store_true", help="an earlier run has filled Triton's cache")
    options = parser.parse_args()
    wrong = False
    if (options.device, options.backend, options.compiled) == ("cuda", "triton", False):
        for line in compile_calls():
            print(f"not compiled ahead: {line}", flush=True)
    for call in CALLS:
        name = call.name.replace(":", "")
        reason = lacking(call, options.device, options.backend)
        if reason is not None:
            print(f"absent {name}: {reason.splitlines()[0]}", flush=True)
            continue
        print(f"begin {name}", flush=True)
        try:
            reason = check(call, options.device, options.backend)
        except Exception as error:  # the others are still to be called
            lines = str(error).strip().splitlines() or [""]
            reason = f"{type(error).__name__}: {lines[0][:200]}"
        wrong |= reason is not None
        print(f"ok {name}" if reason is None else f"wrong {name}: {reason}", flush=True)
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
