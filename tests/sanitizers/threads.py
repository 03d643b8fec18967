"""Every op from several Python threads at once, each divided among threads of its own.

``scripts/sanitize thread`` runs it. A thread's result must be that of a call alone, bit for bit.
"""

import os
import threading

import torch

import kdkernels as kd
from kdkernels import memory

THREADS, STEPS = 3, 4
ROWS, COLUMNS, K = 96, 2500, 20
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def losses(dtype):
    """Losses of a student of this dtype, which share teacher, labels and all else."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    teacher = torch.randn(ROWS, COLUMNS, generator=generator).to(dtype)
    labels = torch.randint(COLUMNS, (ROWS,), generator=generator)
    labels[::5] = -100
    logprobs, ids = torch.log_softmax(teacher.double(), -1).to(dtype).topk(K)
    options = {"temperature": 2.0, "backend": "cpu"}
    sparse = {**options, "teacher_temperature": 1.0}
    return student, {
        **{
            name: lambda s, name=name: kd.kd_loss(s, teacher, labels, divergence=name, ce_weight=0.5, **options)
            for name in ("forward_kl", "jsd", "tvd", "reverse_kl")
        },
        "summed": lambda s: kd.kd_loss(s, teacher, **options),
        "statistics": lambda s: kd.kd_loss(s, teacher, labels, return_stats=True, **options)[0],
        "mixture": lambda s: kd.kd_loss(s, [teacher, teacher.flip(0)], **options),
        "rows": lambda s: kd.kd_loss(s, teacher, labels, reduction="none", **options).square().sum(),
        **{
            tail: lambda s, tail=tail: kd.topk_kd_loss(s, ids, logprobs, labels, tail=tail, **sparse)
            for tail in ("bucket", "renormalize", "uniform")
        },
        "dkd": lambda s: kd.dkd_loss(s, teacher, labels, **options),
        "mse": lambda s: kd.logit_mse_loss(s, teacher, labels, centered=True, backend="cpu"),
        "uld": lambda s: kd.uld_loss(s, teacher, labels, backend="cpu"),
        "uld exact": lambda s: kd.uld_loss(s, teacher, labels, exact=True, backend="cpu"),
        "capture p": lambda s: kd.capture_topp(s.detach(), 0.9, backend="cpu").tail_logprob.sum() + 0 * s.sum(),
        "capture": lambda s: kd.capture_topk(s.detach(), K, backend="cpu").logprobs.sum() + 0 * s.sum(),
    }


def step(student, loss):
    leaf = student.clone().requires_grad_()
    value = loss(leaf)
    value.backward()
    return value.detach(), leaf.grad


def main():
    assert kd.backends.cpu.isa() == os.environ["KDKERNELS_CPU_ISA"]
    # OpenMP's threads stay out of it: the library's rows go to threads of the sanitizer's build.
    torch.set_num_threads(1)
    for dtype in DTYPES:
        student, table = losses(dtype)
        # Large enough for gradients that are kept.
        large = student.repeat(12, 1)
        alone = {name: step(student, loss) for name, loss in table.items()}
        wrong = []

        def work(number, student=student, table=table, large=large, alone=alone, wrong=wrong):
            names = list(table)
            for turn in range(STEPS):
                for i in range(len(names)):
                    name = names[(i + 5 * number + turn) % len(names)]
                    found = step(student, table[name])
                    if not all(map(torch.equal, found, alone[name])):
                        wrong.append(name)
                del found
                step(large, lambda s: kd.kd_loss(s, large.flip(0), backend="cpu"))
                if turn == number:
                    memory.empty_cache()

        threads = [threading.Thread(target=work, args=(number,)) for number in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong, f"{dtype}: other values beside other threads: {sorted(set(wrong))}"
        print(f"{dtype}: {len(table)} losses on {THREADS} threads", flush=True)


if __name__ == "__main__":
    main()
