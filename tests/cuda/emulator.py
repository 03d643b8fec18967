"""The CUDA kernels without a GPU: compiled by nvcc, executed as PTX on the CPU, registered as the backend's ops.

Under ``Emulator.registered()`` CPU tensors run on ``backend="cuda"``: tests of the public functions hold for the
kernels as they are shipped. ``reports`` has the accesses of each launch.
"""

import contextlib
import ctypes
import fcntl
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import subprocess
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from kdkernels import backends, ops
from kdkernels.choices import CODES

ROOT = Path(__file__).resolve().parent.parent.parent
CSRC = ROOT / "csrc"
SOURCES = sorted(path.name for path in (CSRC / "cuda").glob("*.cu"))
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.float64: 3}
NAMES = {torch.float32: "f", torch.bfloat16: "13__nv_bfloat16", torch.float16: "6__half"}
# Of Ampere (A100) and Hopper (H100): shared memory of a block and of a multiprocessor, blocks in a cluster.
LIMITS = {80: (163 << 10, 164 << 10, 1), 90: (227 << 10, 228 << 10, 16)}


def need(name):
    """The path of a program; without it the test is skipped."""
    path = shutil.which(name)
    if path is None:
        pytest.skip(f"{name} is not installed")
    return path


# Processes of one run of the tests, and later ones, compile a source once: the name of a result is made of all that
# goes into it.
KEPT = Path(os.environ.get("KDKERNELS_PTX_CACHE") or Path(tempfile.gettempdir()) / f"kdkernels-ptx-{os.getuid()}")


@functools.cache
def inputs():
    """A hash of the sources, the compiler and this file, which has its flags."""
    found = hashlib.sha256(subprocess.run([need("nvcc"), "--version"], capture_output=True).stdout)
    found.update(f"{torch.__version__} {torch.__file__}".encode())
    for path in sorted([Path(__file__), *(x for part in ("include", "cuda") for x in (CSRC / part).rglob("*"))]):
        if path.is_file():
            found.update(path.name.encode() + path.read_bytes())
    return found.hexdigest()[:32]


@functools.cache
def compiled(source, arch):
    """PTX of ``csrc/cuda/<source>`` and what ptxas says of its kernels: {name: (registers, spilled bytes)}."""
    text, usage = json.loads(kept(source, arch).read_text())
    return text, {name: tuple(numbers) for name, numbers in usage.items()}


def cubin(source, arch):
    """The machine code of ``csrc/cuda/<source>``."""
    return kept(source, arch).with_suffix(".cubin").read_bytes()


@functools.cache
def kept(source, arch):
    """The file that has what ``compiled`` returns; beside it lies one of machine code."""
    need("nvcc")
    KEPT.mkdir(mode=0o700, exist_ok=True)
    found = KEPT / f"{inputs()}-{source}-{arch}.json"
    with found.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not found.exists():
            text, usage, code = compile_anew(source, arch)
            found.with_suffix(".cubin").write_bytes(code)
            part = found.with_suffix(".part")
            part.write_text(json.dumps([text, usage]))
            part.replace(found)
            for other in KEPT.iterdir():
                if not other.name.startswith(inputs()) and time.time() - other.stat().st_mtime > 86400:
                    other.unlink(missing_ok=True)
    return found


def compile_anew(source, arch):
    nvcc, code = need("nvcc"), "90a" if arch == 90 else str(arch)
    include = Path(torch.__file__).parent / "include"
    # The code of the host is compiled once, and of files that differ in the dtype alone for one.
    output = ["-c"] if arch == 90 and source not in ("dense_f16.cu", "dense_f32.cu") else ["-cubin"]
    with tempfile.TemporaryDirectory() as folder:
        command = [nvcc, *output, "-std=c++17", "-O3", "-lineinfo", f"-arch=sm_{code}", "-Xptxas", "-v", "--keep"]
        command += ["--keep-dir", folder, "-DUSE_CUDA=1", "-DTORCH_TARGET_VERSION=0x020a000000000000"]
        command += [f"-I{CSRC / 'include'}", f"-I{include}", "-o", f"{folder}/out", str(CSRC / "cuda" / source)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        # nvcc may keep that of another architecture beside it.
        ptx = max(Path(folder).glob("*.ptx"), key=lambda path: path.name.endswith(f"_{code}.ptx"))
        text = ptx.read_text()
        code_of = [path for path in Path(folder).glob("*.cubin") if path.name.endswith(f"_{code}.cubin")]
        machine = (code_of[0] if code_of else Path(folder) / "out").read_bytes()
    usage, name = {}, ""
    for line in done.stderr.splitlines():
        if found := re.search(r"Compiling entry function '(\w+)'", line):
            name = found[1]
        elif found := re.search(r"(\d+) bytes spill stores, (\d+) bytes spill loads", line):
            spilled = int(found[1]) + int(found[2])
        elif found := re.search(r"Used (\d+) registers", line):
            usage[name] = (int(found[1]), spilled)
    return text, usage, machine


@functools.cache
def module(source, arch):
    ptxrun = pytest.importorskip("ptxrun", reason="ptxrun is not installed")
    return ptxrun.Module.from_ptx(compiled(source, arch)[0])


INTEGERS = """batch length columns width ids_are_64_bits entries tail ignore_index scale_by_t_squared
    student student_stride_b student_stride_l student_dtype dstudent dstudent_stride_b dstudent_stride_l
    ids logprobs logprobs_dtype labels loss stats workspace
    row_weight row_weight_stride student_temperature student_temperature_stride
    teacher_temperature teacher_temperature_stride param param_stride tail_rows tail_rows_stride
    kd_weights kd_weights_stride ce_weights ce_weights_stride z_loss_weights z_loss_weights_stride""".split()
NUMBERS = """scale param0 param1 temperature teacher_temperature_value
    kd_weight ce_weight z_loss_weight label_smoothing student_softcap min_tail tail_rounding""".split()
PLAN = """shared_per_block shared_per_multiprocessor cluster
    resident every plan_cluster threads shared_bytes workspace_per_row""".split()


def load_arguments(name):
    """A library of one of the files here, which builds kernels' arguments as the CUDA backend does."""
    with tempfile.TemporaryDirectory() as folder:
        source, output = Path(__file__).parent / name, f"{folder}/arguments.so"
        flags = ["-std=c++17", "-O0", "-shared", "-fPIC", f"-I{CSRC / 'include'}"]
        subprocess.run([need("g++"), *flags, str(source), "-o", output], check=True)
        return ctypes.CDLL(output)


def fields(integers, numbers, plan):
    """Of a structure in which everything is 8 bytes wide."""
    kinds = ((integers, ctypes.c_int64), (numbers, ctypes.c_double), (plan, ctypes.c_int64))
    return [(name, kind) for names, kind in kinds for name in names]


class Call(ctypes.Structure):
    """As in arguments.cpp."""

    _fields_ = fields(INTEGERS, NUMBERS, PLAN)


@functools.cache
def arguments_library():
    library = load_arguments("arguments.cpp")
    library.topk_launch_bytes.restype = library.topk_launch.restype = ctypes.c_int64
    library.token_args_bytes.restype = ctypes.c_int64
    return library


def plan(call, divergence="forward_kl"):
    """Fills in the plan of a call; returns the bytes of the kernel's argument."""
    library = arguments_library()
    out = ctypes.create_string_buffer(library.topk_launch_bytes())
    assert library.topk_launch(ctypes.byref(call), divergence.encode(), out) == 0
    return out.raw


class Device:
    """Memory of one launch. Tensors are copied there, with their storage, and outputs are copied back."""

    def __init__(self):
        from ptxrun import Memory

        self.memory = Memory()
        self.allocations = {}

    def _storage(self, tensor):
        storage = tensor.untyped_storage()
        return storage, np.frombuffer((ctypes.c_char * storage.nbytes()).from_address(storage.data_ptr()), np.uint8)

    def address(self, tensor):
        if tensor is None:
            return 0
        storage, data = self._storage(tensor)
        if storage.data_ptr() not in self.allocations:
            self.allocations[storage.data_ptr()] = self.memory.array(data.copy())
        allocation = self.allocations[storage.data_ptr()]
        return allocation.ptr + tensor.data_ptr() - storage.data_ptr()

    def bring_back(self, tensor):
        _, data = self._storage(tensor)
        data[:] = self.allocations[tensor.untyped_storage().data_ptr()].numpy().reshape(-1)


class Emulator:
    """Runs the ops on PTX for ``arch``; ``limits`` as LIMITS, smaller ones to force a form.

    check_global_races: whether accesses of several blocks to one byte of global memory are looked at; ptxrun takes
        those that a barrier of their cluster puts in order for races.
    """

    def __init__(self, arch, limits=None, check_global_races=True):
        self.check_global_races = check_global_races
        self.arch, self.limits = arch, limits or LIMITS[arch]
        self.reports, self.plans = [], []

    @contextlib.contextmanager
    def registered(self):
        library = torch.library.Library("kdkernels", "IMPL")
        library.impl("topk_fwd_cuda", self.topk_fwd, "CPU")
        library.impl("token_fwd_cuda", self.token_fwd, "CPU")
        library.impl("token_bwd_cuda", self.token_bwd, "CPU")
        library.impl("scale_grad_cuda", self.scale_grad, "CPU")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.cuda, "why_not", lambda device_type: None)
            yield self
        library._destroy()

    def _launch(self, source, name, device, grid, block, arguments, **keywords):
        from ptxrun import launch

        mod = module(source, self.arch)
        (kernel,) = [found for found in mod.kernels if name in found]
        keywords["check_global_races"] = self.check_global_races
        report = launch(mod[kernel], grid=grid, block=block, args=arguments, mem=device.memory, **keywords)
        assert report.ok, report
        self.reports.append(report)

    def topk_fwd(
        self,
        student,
        ids,
        logprobs,
        dstudent,
        labels,
        row_weight,
        temperatures,
        teacher_temperatures,
        param,
        kd_weights,
        ce_weights,
        z_loss_weights,
        tail_rows,
        *,
        numbers,
        choices,
        **options,
    ):
        options |= ops.named("topk_fwd", numbers, choices)
        device, call = Device(), Call()
        call.batch, call.length, call.width = student.shape
        rows = student.shape[0] * student.shape[1]
        loss = torch.full((rows,), torch.nan)
        stats = torch.full((rows, len(ops.TOPK_STATS) if options["stats"] else 0), torch.nan)
        for name in ("student", "dstudent"):
            tensor = student if name == "student" else dstudent
            setattr(call, name, device.address(tensor))
            if tensor is not None:
                setattr(call, f"{name}_stride_b", tensor.stride(0))
                setattr(call, f"{name}_stride_l", tensor.stride(1))
        rows_of = {
            "row_weight": row_weight,
            "student_temperature": temperatures,
            "teacher_temperature": teacher_temperatures,
            "param": param,
            "kd_weights": kd_weights,
            "ce_weights": ce_weights,
            "z_loss_weights": z_loss_weights,
            "tail_rows": tail_rows,
        }
        for name, tensor in rows_of.items():
            setattr(call, name, device.address(tensor))
            setattr(call, f"{name}_stride", 0 if tensor is None else tensor.stride(0))
        call.student_dtype, call.logprobs_dtype = DTYPES[student.dtype], DTYPES[logprobs.dtype]
        call.ids, call.logprobs, call.labels = (device.address(tensor) for tensor in (ids, logprobs, labels))
        call.ids_are_64_bits, call.entries = ids.dtype == torch.int64, ids.shape[1]
        call.loss, call.stats = device.address(loss), device.address(stats) if options["stats"] else 0
        call.columns, call.tail = options["vocab_size"], CODES["tail"].index(options["tail"])
        call.teacher_temperature_value = options["teacher_temperature"]
        for name in ("ignore_index", "scale_by_t_squared", *NUMBERS):
            if name in options:
                setattr(call, name, options[name])
        call.shared_per_block, call.shared_per_multiprocessor, call.cluster = self.limits
        plan(call, options["divergence"])
        if call.workspace_per_row:
            call.workspace = device.memory.empty(rows * call.workspace_per_row, np.uint8).ptr
        self.plans.append(call)
        self._launch(
            "topk.cu",
            f"topk_fwd_kernelI{NAMES[student.dtype]}E",
            device,
            rows * call.plan_cluster,
            call.threads,
            [plan(call, options["divergence"])],
            shared_bytes=call.shared_bytes,
            cluster=(call.plan_cluster, 1, 1),
        )
        for tensor in (loss, *([stats] if options["stats"] else []), *([] if dstudent is None else [dstudent])):
            device.bring_back(tensor)
        return loss, stats

    def token_fwd(self, logits, ids, temperature_rows, *, vocab_size, numbers, choices):
        options = ops.named("token_fwd", numbers, choices)
        rows, K = ids.shape
        sizes = {"logprobs": (rows, K), "lse": (rows,), "norm": (rows, 2)}
        sizes["entropy"] = (rows if options["entropy"] else 0,)
        sizes["tail"] = (rows if options["tail_mass"] else 0,)
        sizes["stats"] = (rows, 2 + K) if options["stats"] else (0,)
        results = {name: torch.full(size, torch.nan) for name, size in sizes.items()}

        def launch(**wanted):
            device = Device()
            given = {
                name: results[name] for name in ("logprobs", "lse", "norm", *(name for name in wanted if wanted[name]))
            }
            self._tokens(device, "token_fwd", logits, None, ids, temperature_rows, vocab_size, options, given, wanted)
            for tensor in given.values():
                device.bring_back(tensor)

        # As run_tokens of tokens.cu does it.
        if rows > 0 and options["tail_mass"]:
            launch(entropy=False, stats=False, tail=True)
        if rows > 0 and (options["entropy"] or options["stats"] or not options["tail_mass"]):
            launch(entropy=options["entropy"], stats=options["stats"], tail=False)
        return tuple(results[name] for name in ("logprobs", "entropy", "lse", "tail", "norm", "stats"))

    def token_bwd(
        self,
        logits,
        ids,
        norm,
        entropy,
        dlogprobs,
        dentropy,
        dlogits,
        temperature_rows,
        *,
        vocab_size,
        numbers,
        choices,
    ):
        if ids.shape[0] == 0:
            return
        device, options = Device(), ops.named("token_bwd", numbers, choices)
        given = {"norm": norm, "entropy": entropy, "dlogprobs": dlogprobs, "dentropy": dentropy}
        wanted = {"entropy": entropy is not None}
        self._tokens(device, "token_bwd", logits, dlogits, ids, temperature_rows, vocab_size, options, given, wanted)
        device.bring_back(dlogits)

    def _tokens(self, device, pattern, logits, dlogits, ids, temperature_rows, columns, options, given, wanted):
        assert ids.is_contiguous() and all(item is None or item.is_contiguous() for item in given.values())
        fields = [*(logits.shape[:2] if logits.dim() == 3 else (1, logits.shape[0])), columns, logits.shape[-1]]
        for view in (logits, dlogits):
            if view is None:
                fields += [0, 0, 0, 0]
            else:
                stride_b = view.stride(0) if view.dim() == 3 else 0
                fields += [device.address(view), stride_b, view.stride(-2), DTYPES[view.dtype]]
        fields += [device.address(ids), ids.shape[1], options["ignore_index"], device.address(temperature_rows)]
        fields += [0 if temperature_rows is None else temperature_rows.stride(0)]
        names = "logprobs lse entropy tail stats norm dlogprobs dentropy".split()
        pointers = [device.address(given.get(name)) for name in names]
        packed = struct.pack(f"<{len(fields)}q2d8q", *fields, options["temperature"], options["softcap"], *pointers)
        library = arguments_library()
        assert len(packed) == library.token_args_bytes()
        plan = (ctypes.c_int64 * 2)()
        library.token_plan(packed, plan)
        flags = ("entropy", "stats", "tail") if pattern == "token_fwd" else ("entropy",)
        name = f"{pattern}_kernelI{NAMES[logits.dtype]}" + "".join(f"Lb{int(wanted[flag])}E" for flag in flags)
        rows = ids.shape[0]
        self._launch("tokens.cu", name, device, rows, plan[0], [packed], shared_bytes=plan[1])

    def scale_grad(self, grad, factor):
        device = Device()
        rows, pieces = grad.shape[0] * grad.shape[1], 2
        # ScaleArgs
        fields = [*grad.shape, device.address(grad), grad.stride(0), grad.stride(1), DTYPES[grad.dtype]]
        fields += [device.address(factor), factor.stride(0) if factor.dim() and factor.numel() > 1 else 0]
        packed = np.array([*fields, DTYPES[factor.dtype]], np.int64).tobytes()
        name = f"scale_grad_kernelI{NAMES[grad.dtype]}E"
        self._launch("scale.cu", name, device, rows * pieces, 256, [packed, np.int32(pieces)])
        device.bring_back(grad)
