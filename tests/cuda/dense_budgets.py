"""The dense CUDA kernels as they compile and as they are launched: ``budgets.json``, which this file writes.

    python tests/cuda/dense_budgets.py

Of a call on a GPU, with rows without end: the kernel, how a row comes (``Source`` in dense_plan.h), the blocks of a
row, their threads, the stages and bytes of shared memory; registers and spilled bytes a thread, and the blocks that a
multiprocessor holds. From the machine code: the barriers of the cluster that stand in the row's loop, fences at the
scope of the GPU, and barriers of the block, each counted once.
"""

import functools
import json
import sys
from collections import Counter
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parent.parent / "kernels"))

from dense_emulator import FILES, HELD, SOURCES, DenseCall, plan
from emulator import DTYPES, LIMITS, NAMES, compiled, cubin
from launches import sass_of_kernels

TABLE = Path(__file__).with_name("budgets.json")
MULTIPROCESSORS = {80: 108, 90: 132}
# Of a multiprocessor: registers, warps, and blocks.
REGISTERS, WARPS, BLOCKS = 65536, 64, 32
# Registers of a thread that another version of the compiler may take.
SLACK = 4
EXACTLY = ("kernel", "source", "blocks", "threads", "stages")
AT_MOST = ("shared", "registers", "spilled", "cluster_barriers", "gpu_fences", "block_barriers")
STATS = {"stats": 1}
CALLS = [(arch, V, "forward_kl", {}) for arch in (80, 90) for V in (1000, 8192, 32000, 50257, 128256)]
CALLS += [(90, V, "forward_kl", {}) for V in (152064, 262144)]
CALLS += [(80, V, "forward_kl", {}) for V in (16384,)]
CALLS += [(arch, V, name, {}) for arch in (80, 90) for V in (1000, 50257) for name in HELD[1:7]]
CALLS += [(arch, V, "forward_kl", STATS) for arch in (80, 90) for V in (1000, 32000, 50257)]


def key(arch, V, name, options):
    return f"sm_{arch}/{'-'.join([name, f'V{V}', *options])}"


@functools.cache
def barriers(source, arch):
    """Of each kernel of a source: barriers of the cluster, fences at the scope of the GPU, barriers of the block."""
    counts = {}
    for kernel, instructions in sass_of_kernels(cubin(source, arch)).items():
        found = Counter(instructions)

        def those(*beginnings, found=found):
            return sum(count for name, count in found.items() if name.startswith(beginnings))

        fences = sum(count for name, count in found.items() if name.startswith("MEMBAR") and "GPU" in name)
        counts[kernel] = (those("UCGABAR_WAIT"), fences, those("BAR.SYNC"))
    return counts


def measured(arch, V, name, options):
    dtype = torch.bfloat16
    call = DenseCall(batch=1, length=1 << 16, columns=V, width=V, kd_weight=1.0, **options)
    call.student_dtype = call.teacher_dtype = DTYPES[dtype]
    call.multiprocessors = MULTIPROCESSORS[arch]
    for tensor in ("student", "teacher", "dstudent"):
        setattr(call, tensor, 1 << 20)
        setattr(call, f"{tensor}_stride_l", V)
    call.shared_per_block, call.shared_per_multiprocessor, call.cluster = LIMITS[arch]
    plan(call, name)
    held = f"dense_held_kernelI{NAMES[dtype]}LNS0_4HeldE{call.held}E"
    pattern = held if HELD[call.held] else f"dense_swept_kernelI{NAMES[dtype]}E"
    usage = compiled(FILES[dtype], arch)[1]
    (kernel,) = [found for found in usage if pattern in found]
    registers, spilled = usage[kernel]
    of_cluster, fences, of_block = barriers(FILES[dtype], arch)[kernel]
    # Registers are given to a warp in units of 256; the system takes 1 KB of shared memory of each block.
    by_registers = REGISTERS // (-(-(registers + SLACK) // 8) * 8 * call.threads)
    by_shared = LIMITS[arch][1] // (call.shared_bytes + 1024)
    return {
        "kernel": f"held {HELD[call.held]}" if HELD[call.held] else "swept",
        "source": SOURCES[call.source],
        "blocks": call.plan_cluster,
        "threads": call.threads,
        "stages": call.stages,
        "shared": call.shared_bytes,
        "registers": registers,
        "spilled": spilled,
        "resident_blocks": min(by_registers, by_shared, BLOCKS, WARPS * 32 // call.threads),
        # That of the launch, after the barriers in shared memory are made, is in no row.
        "cluster_barriers": of_cluster - (arch >= 90),
        "gpu_fences": fences,
        "block_barriers": of_block,
    }


def excesses(found, budget):
    """The names of what is not as the budget says."""
    wrong = [name for name in EXACTLY if found[name] != budget[name]]
    wrong += [name for name in AT_MOST if found[name] > budget[name] + SLACK * (name == "registers")]
    return wrong + ["resident_blocks"] * (found["resident_blocks"] < budget["resident_blocks"])


def read():
    return json.loads(TABLE.read_text())


def main():
    rows = [f"{json.dumps(key(*call))}: {json.dumps(measured(*call))}" for call in CALLS]
    TABLE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


if __name__ == "__main__":
    main()
