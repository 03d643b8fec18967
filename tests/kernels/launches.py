"""Calls of the Triton launchers with everything at its default, and what they compile to without a GPU."""

import contextlib
import re
import subprocess
import tempfile
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from kdkernels.kernels.dense import dense_fwd
from kdkernels.kernels.dkd import dkd_fwd
from kdkernels.kernels.mapped import mapped_fwd
from kdkernels.kernels.mse import mse_fwd
from kdkernels.kernels.tokens import token_bwd, token_fwd
from kdkernels.kernels.topk import topk_fwd
from kdkernels.kernels.uld import uld_fwd

DENSE_ONLY = ("mixture", "teacher_form", "teacher_softcap", "standardize")
DENSE = {
    "divergence": "forward_kl",
    "param0": 0.0,
    "param1": 0.0,
    "mixture": "probs",
    "ignore_index": -100,
    "scale": 1.0,
    "temperature": 1.0,
    "teacher_temperature": 1.0,
    "kd_weight": 1.0,
    "ce_weight": 0.0,
    "z_loss_weight": 0.0,
    "label_smoothing": 0.0,
    "scale_by_t_squared": True,
    "teacher_form": "logits",
    "student_softcap": 0.0,
    "teacher_softcap": 0.0,
    "standardize": False,
    "stats": False,
}
TOPK = {
    "tail": "bucket",
    "min_tail": 0.0,
    "tail_rounding": 0.0,
    **{name: value for name, value in DENSE.items() if name not in DENSE_ONLY},
}
DKD = {
    "alpha": 1.0,
    "beta": 8.0,
    "temperature": 1.0,
    "teacher_temperature": 1.0,
    "ignore_index": -100,
    "scale": 1.0,
    "scale_by_t_squared": True,
}
MSE = {"centered": False, "ignore_index": -100, "scale": 1.0}
ULD = {"temperature": 1.0, "teacher_temperature": 1.0, "ignore_index": -100, "scale": 1.0, "exact": False}
TOKENS = {"temperature": 1.0, "softcap": 0.0, "ignore_index": -100, "entropy": False}
TOKENS |= {"tail_mass": False, "stats": False}


def dense(
    student,
    teachers,
    dstudent=None,
    labels=None,
    row_weight=None,
    *,
    temperature_rows=None,
    teacher_temperature_rows=None,
    param_rows=None,
    mixture_weights=None,
    **options,
):
    options = {**DENSE, "vocab_size": student.shape[-1], **options}
    tensors = (
        labels,
        row_weight,
        temperature_rows,
        teacher_temperature_rows,
        param_rows,
        *(None,) * 3,
        mixture_weights,
    )
    return dense_fwd(student, teachers, dstudent, *tensors, **options)


def mapped(student, teacher, dstudent=None, labels=None, *, of_columns=(None, None, None), **options):
    known = {name: value for name, value in DENSE.items() if name not in ("mixture", "standardize")}
    options = {**known, "student_form": "logits", "vocab_size": student.shape[-1], **options}
    return mapped_fwd(student, teacher, dstudent, labels, *(None,) * 7, *of_columns, **options)


def topk(
    student,
    ids,
    logprobs,
    dstudent=None,
    labels=None,
    row_weight=None,
    *,
    temperature_rows=None,
    teacher_temperature_rows=None,
    param_rows=None,
    tail_rows=None,
    **options,
):
    options = {**TOPK, "vocab_size": student.shape[-1], **options}
    tensors = (labels, row_weight, temperature_rows, teacher_temperature_rows, param_rows, *(None,) * 3, tail_rows)
    return topk_fwd(student, ids, logprobs, dstudent, *tensors, **options)


def dkd(student, teacher, dstudent, labels, row_weight=None, **options):
    options = {**DKD, "vocab_size": student.shape[-1], **options}
    return dkd_fwd(student, teacher, dstudent, labels, row_weight, **options)


def mse(student, teacher, dstudent=None, labels=None, row_weight=None, **options):
    options = {**MSE, "vocab_size": student.shape[-1], **options}
    return mse_fwd(student, teacher, dstudent, labels, row_weight, **options)


def uld(student, teacher, dstudent=None, labels=None, row_weight=None, temperatures=(None, None), **options):
    sizes = {"vocab_size": student.shape[-1], "teacher_vocab_size": teacher.shape[-1]}
    return uld_fwd(student, teacher, dstudent, labels, row_weight, *temperatures, **{**ULD, **sizes, **options})


def tokens(logits, ids, *, temperature_rows=None, **options):
    options = {**TOKENS, "vocab_size": logits.shape[-1], **options}
    return token_fwd(logits, ids, temperature_rows, **options)


def tokens_back(logits, ids, norm, entropy, dlogprobs, dentropy, dlogits, /, *, temperature_rows=None, **options):
    options = {**TOKENS, "vocab_size": logits.shape[-1], **options}
    token_bwd(logits, ids, norm, entropy, dlogprobs, dentropy, dlogits, temperature_rows, **options)


class Launch(NamedTuple):
    """A launch, recorded instead of run."""

    fn: JITFunction
    args: tuple
    kwargs: dict


class Binary(NamedTuple):
    """The results of a compilation: registers a thread, bytes (AMD: registers) spilled a thread, bytes of shared memory
    a block, the assembly (PTX, AMD: GCN), Triton's GPU dialect, and NVIDIA's machine code."""

    registers: int
    spilled: int
    shared: int
    text: str
    ttgir: str = ""
    cubin: bytes = b""

    def widths(self, kind):
        """Bytes of every global load ("ld") or store ("st") in PTX."""
        found = re.findall(rf"\b{kind}\.global[a-zA-Z_:.]*?(?:\.v(\d))?\.[busf](\d+)\b", self.text)
        return [int(vector or 1) * int(bits) // 8 for vector, bits in found]


@contextlib.contextmanager
def recorded():
    """Inside, kernel[grid](...) runs nothing; yields the list of launches."""
    launches = []

    def record(self, *args, grid, warmup, **kwargs):
        launches.append(Launch(self, args, kwargs))

    run, JITFunction.run = JITFunction.run, record
    try:
        yield launches
    finally:
        JITFunction.run = run


def compile_for(launch, name):
    """Compile a recorded launch for "sm_90" or "gfx942", specialised to its arguments as a launch there would be."""
    cuda = name.startswith("sm_")
    target = GPUTarget("cuda", int(name[3:]), 32) if cuda else GPUTarget("hip", name, 64)
    backend = make_backend(target)
    kwargs = {**launch.kwargs, "debug": False, "instrumentation_mode": triton.knobs.compilation.instrumentation_mode}
    bind = create_function_from_signature(launch.fn.signature, launch.fn.params, backend)
    bound, specialization, options = bind(*launch.args, **kwargs)
    options, signature, constexprs, attrs = launch.fn._pack_args(backend, kwargs, bound, specialization, options)
    source = ASTSource(launch.fn, signature, constexprs, attrs)
    kernel = triton.compile(source, target=target, options=options.__dict__)
    if cuda:
        cubin = kernel.asm["cubin"]
        return Binary(*_resources(cubin), kernel.metadata.shared, kernel.asm["ptx"], kernel.asm["ttgir"], cubin)
    text = kernel.asm["amdgcn"]
    registers, spilled = (
        int(re.search(rf"\.{key}:\s+(\d+)", text).group(1)) for key in ("vgpr_count", "vgpr_spill_count")
    )
    return Binary(registers, spilled, kernel.metadata.shared, text)


def specialisation(launch, capability):
    """The part of a launch that a CUDA GPU's kernel is compiled for, as text."""
    backend = make_backend(GPUTarget("cuda", capability, 32))
    bind = create_function_from_signature(launch.fn.signature, launch.fn.params, backend)
    return str(bind(*launch.args, debug=False, **launch.kwargs)[1])


def sass(cubin):
    """The instructions of a cubin, one a line, predicated ones included and padding not."""
    return [name for kernel in sass_of_kernels(cubin).values() for name in kernel]


def sass_of_kernels(cubin):
    """The same of each kernel in it, by mangled name."""
    parts = re.split(r"^\s*\.section\s+\.text\.(\w+)", _tool("nvdisasm", "-c", cubin), flags=re.MULTILINE)
    instruction = re.compile(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", re.MULTILINE)
    return {
        kernel: [name for name in instruction.findall(text) if name != "NOP"]
        for kernel, text in zip(parts[1::2], parts[2::2], strict=True)
    }


def _tool(name, option, cubin):
    """Run a tool that comes with Triton; it reads no pipe."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [Path(triton.__file__).parent / "backends/nvidia/bin" / name, option, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _resources(cubin):
    """Registers and bytes of stack a thread."""
    out = _tool("cuobjdump", "-res-usage", cubin)
    found = re.search(r"REG:(\d+) STACK:(\d+)", out)
    return int(found.group(1)), int(found.group(2))
