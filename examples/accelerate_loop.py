"""Distillation in a loop of Accelerate, whose accumulated batches count as one: `pip install accelerate`."""

import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin

import kdkernels as kd


def main(epochs=2, parts=2, batch_size=8):
    torch.manual_seed(0)
    plugin = GradientAccumulationPlugin(num_steps=parts, sync_with_dataloader=False)  # drawn ahead
    accelerator = Accelerator(gradient_accumulation_plugin=plugin, cpu=True)
    student, teacher = torch.nn.Linear(32, 1000), torch.nn.Linear(32, 1000)
    labels = torch.where(torch.arange(64) % 5 == 0, -100, 0)
    data = torch.utils.data.TensorDataset(torch.randn(64, 32), labels)
    loader = torch.utils.data.DataLoader(data, batch_size=batch_size)
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-2)
    student, optimizer, loader = accelerator.prepare(student, optimizer, loader)
    teacher = accelerator.prepare_model(teacher, evaluation_mode=True)
    losses = []
    for batches in (list(loader) for _ in range(epochs)):
        for group in (batches[i : i + parts] for i in range(0, len(batches), parts)):
            # Tokens of all processes. Gradients are averaged over these, and over the parts.
            tokens = accelerator.reduce(sum((labels != -100).sum() for _, labels in group))
            share = tokens / (accelerator.num_processes * parts)
            losses.append(0.0)
            for inputs, labels in group:
                with accelerator.accumulate(student):
                    targets = teacher(inputs).detach()
                    loss = kd.kd_loss(student(inputs), targets, labels, normalizer=share, temperature=2.0)
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                losses[-1] += loss.item() / parts
    return losses


if __name__ == "__main__":
    print(main())
