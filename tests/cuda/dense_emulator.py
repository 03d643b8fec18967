"""The dense CUDA kernels without a GPU: a launcher of the op's signature that executes their PTX; see emulator.py."""

import contextlib
import ctypes
import functools

import pytest
import torch
from emulator import DTYPES, LIMITS, NAMES, Device, fields, load_arguments, module

from kdkernels import backends, ops

STATS = 9
FILES = {torch.float32: "dense_f32.cu", torch.bfloat16: "dense_bf16.cu", torch.float16: "dense_f16.cu"}
# In the order of Held and Source in dense_plan.h.
HELD = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "skew_reverse_kl", None)
SOURCES = ("bulk", "copies", "streamed")
MULTIPROCESSORS = 132

INTEGERS = """batch length columns width ignore_index scale_by_t_squared probs
    student student_stride_b student_stride_l student_dtype teacher teacher_stride_b teacher_stride_l teacher_dtype
    dstudent dstudent_stride_b dstudent_stride_l labels loss stats
    row_weight row_weight_stride student_temperature student_temperature_stride
    teacher_temperature teacher_temperature_stride param param_stride""".split()
NUMBERS = """scale param0 param1 temperature teacher_temperature_value
    kd_weight ce_weight z_loss_weight label_smoothing student_softcap teacher_softcap""".split()
PLAN = """shared_per_block shared_per_multiprocessor cluster multiprocessors
    held source plan_cluster threads stages shared_bytes""".split()


class DenseCall(ctypes.Structure):
    """As in dense_arguments.cpp."""

    _fields_ = fields(INTEGERS, NUMBERS, PLAN)


@functools.cache
def library():
    loaded = load_arguments("dense_arguments.cpp")
    loaded.dense_launch_bytes.restype = loaded.dense_launch.restype = ctypes.c_int64
    return loaded


def plan(call, divergence="forward_kl"):
    """Fills in the plan of a call; returns the bytes of the kernel's argument."""
    out = ctypes.create_string_buffer(library().dense_launch_bytes())
    assert library().dense_launch(ctypes.byref(call), divergence.encode(), out) == 0
    return out.raw


class DenseEmulator:
    """Runs dense_fwd as PTX for ``arch``.

    limits: as LIMITS, smaller ones to force a form. clusters: how many fit on the GPU, so that each takes several rows.
    schedule: ``late`` and ``seed`` of ptxrun's launch. compiled: another ptxrun module than that of the sources.
    """

    def __init__(self, arch, limits=None, clusters=2, multiprocessors=1, compiled=None, **schedule):
        self.compiled = compiled
        self.arch, self.limits, self.clusters = arch, limits or LIMITS[arch], clusters
        self.multiprocessors, self.schedule = multiprocessors, schedule
        self.reports, self.plans = [], []

    @contextlib.contextmanager
    def registered(self):
        """CPU tensors run on ``backend="cuda"``."""
        library = torch.library.Library("kdkernels", "IMPL")
        library.impl("dense_fwd_cuda", self._op, "CPU")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(backends.cuda, "why_not", lambda device_type: None)
            yield self
        library._destroy()

    def _op(
        self,
        student,
        teachers,
        dstudent,
        labels,
        row_weight,
        temperatures,
        teacher_temperatures,
        param,
        kd_weights,
        ce_weights,
        z_loss_weights,
        mixture,
        teacher_lse,
        student_offsets,
        teacher_offsets,
        teacher_columns,
        *,
        numbers,
        choices,
        **options,
    ):
        options |= ops.named("dense_fwd", numbers, choices)
        assert mixture is teacher_lse is kd_weights is ce_weights is z_loss_weights is None
        assert student_offsets is teacher_offsets is teacher_columns is None
        assert options.pop("student_form") == "logits"
        assert not options.pop("standardize") and options.pop("mixture") == "probs"
        rows = {"temperature_rows": temperatures, "teacher_temperature_rows": teacher_temperatures, "param_rows": param}
        return self(student, teachers, dstudent, labels, row_weight, **rows, **options)

    def __call__(
        self,
        student,
        teachers,
        dstudent=None,
        labels=None,
        row_weight=None,
        *,
        temperature_rows=None,
        teacher_temperature_rows=None,
        param_rows=None,
        divergence="forward_kl",
        teacher_temperature=1.0,
        teacher_form="logits",
        stats=False,
        vocab_size=None,
        **options,
    ):
        from ptxrun import launch

        options = {"scale": 1.0, "temperature": 1.0, "kd_weight": 1.0, "ignore_index": -100, **options}
        device, call = Device(), DenseCall()
        (teacher,) = teachers
        cube = student.shape if student.dim() == 3 else (1, *student.shape)
        call.batch, call.length, call.width = cube
        rows = call.batch * call.length
        loss = torch.full((rows,), torch.nan)
        out_stats = torch.full((rows, STATS if stats else 0), torch.nan)
        for name, tensor in {"student": student, "teacher": teacher, "dstudent": dstudent}.items():
            setattr(call, name, device.address(tensor))
            if tensor is not None:
                setattr(call, f"{name}_stride_b", tensor.stride(0) if tensor.dim() == 3 else 0)
                setattr(call, f"{name}_stride_l", tensor.stride(-2))
        per_row = {
            "row_weight": row_weight,
            "student_temperature": temperature_rows,
            "teacher_temperature": teacher_temperature_rows,
            "param": param_rows,
        }
        for name, tensor in per_row.items():
            setattr(call, name, device.address(tensor))
            setattr(call, f"{name}_stride", 0 if tensor is None else tensor.stride(0))
        call.student_dtype, call.teacher_dtype = DTYPES[student.dtype], DTYPES[teacher.dtype]
        call.labels, call.loss = device.address(labels), device.address(loss)
        call.stats = device.address(out_stats) if stats else 0
        call.columns = vocab_size or call.width
        call.probs = teacher_form in ("probs", "unnormalized_probs")
        call.teacher_temperature_value = teacher_temperature
        call.scale_by_t_squared = options.pop("scale_by_t_squared", True)
        for name, value in options.items():
            assert name in (*INTEGERS, *NUMBERS), name
            setattr(call, name, value)
        call.shared_per_block, call.shared_per_multiprocessor, call.cluster = self.limits
        call.multiprocessors = self.multiprocessors
        argument = plan(call, divergence)
        self.plans.append(call)
        held = f"dense_held_kernelI{NAMES[student.dtype]}LNS0_4HeldE{call.held}E"
        name = held if HELD[call.held] else f"dense_swept_kernelI{NAMES[student.dtype]}E"
        mod = self.compiled or module(FILES[student.dtype], self.arch)
        (kernel,) = [found for found in mod.kernels if name in found]
        report = launch(
            mod[kernel],
            grid=min(rows, self.clusters) * call.plan_cluster,
            block=call.threads,
            args=[argument],
            mem=device.memory,
            shared_bytes=call.shared_bytes,
            cluster=(call.plan_cluster, 1, 1),
            **self.schedule,
        )
        self.reports.append(report)
        assert report.ok and not report.warnings, report
        for tensor in (loss, *([out_stats] if stats else []), *([] if dstudent is None else [dstudent])):
            device.bring_back(tensor)
        return loss, out_stats
