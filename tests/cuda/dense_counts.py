"""Prints the table of docs/internals/cuda.md: accesses and instructions of the dense CUDA kernels, by ptxrun.

    python tests/cuda/dense_counts.py

R and W are the 32-byte sectors of loads and stores in passes over one tensor of the call; instructions are those of PTX
that a thread executes, an element, with what it executes while it waits.
"""

import torch
from dense_emulator import HELD, SOURCES, DenseEmulator

BF16, FP32 = torch.bfloat16, torch.float32
PARAMS = {"jsd": {"param0": 0.5}, "skew_kl": {"param0": 0.1}, "skew_reverse_kl": {"param0": 0.1}}
PARAMS["alpha_beta"] = {"param0": 0.5, "param1": 0.5}
NAMES = ("forward_kl", "reverse_kl", "jeffreys", "jsd", "tvd", "skew_kl", "skew_reverse_kl", "alpha_beta")
CASES = [
    *((90, V, BF16, "forward_kl", {}) for V in (1000, 8192, 32000, 50257, 128256, 152064, 262144)),
    (90, 128256, FP32, "forward_kl", {}),
    (90, 128256, BF16, "forward_kl", {"ce_weight": 0.5}),
    (90, 128256, BF16, "forward_kl", {"stats": True}),
    *((90, 8192, BF16, name, {}) for name in NAMES[1:]),
    *((80, V, BF16, "forward_kl", {}) for V in (1000, 8192, 32000, 50257, 128256)),
    *((80, V, BF16, "jsd", {}) for V in (8192, 128256)),
]


def count(arch, V, dtype, name, options, rows=4):
    student, teacher = ((torch.randn(rows, V) * 4).to(dtype) for _ in range(2))
    labels = torch.zeros(rows, dtype=torch.int64) if "ce_weight" in options else None
    emulator = DenseEmulator(arch, clusters=1)
    emulator(student, [teacher], torch.empty_like(student), labels, divergence=name, **PARAMS.get(name, {}), **options)
    report, call = emulator.reports[0], emulator.plans[0]
    size, elements = student.element_size(), rows * V
    return {
        "arch": f"{arch // 10}.{arch % 10}",
        "V": f"{V:,} {'fp32' if size == 4 else 'bf16'}",
        "loss": " ".join([f"`{name}`", *options]),
        "kernel": f"{'held' if HELD[call.held] else 'swept'}, {SOURCES[call.source]}",
        "blocks": f"{call.plan_cluster} of {call.threads}",
        "R": f"{32 * report.load_sectors / elements / size:.2f}",
        "W": f"{32 * report.store_sectors / elements / size:.2f}",
        "instructions": f"{report.thread_instr / elements:.1f}",
    }


def main():
    for number, case in enumerate(CASES):
        row = count(*case)
        if number == 0:
            print("| " + " | ".join(row) + " |\n" + "| --- " * len(row) + "|")
        print("| " + " | ".join(row.values()) + " |", flush=True)


if __name__ == "__main__":
    main()
