"""Distill a convolutional teacher of handwritten digits into a small student, with eager PyTorch and with kdkernels.

The data are scikit-learn's 1797 digits of 8 x 8 pixels; no download. The student never sees a label.
"""

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn

import common

# More threads gain nothing on networks this small, and lose much where other programs run.
DEFAULTS = {"steps": 600, "batch_size": 128, "temperature": 4.0, "teacher_steps": 1000, "threads": 1}
QUICK = {"steps": 300, "teacher_steps": 300}
CLASSES = 10
TEACHER_BATCH = 64
# Of the relative difference of the curves. Rounding alone gives 1e-6; a wrong gradient shows in the first steps.
TOLERANCE = 1e-3


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images [1437, 1, 8, 8], test images [360, 1, 8, 8] in [0, 1], and their labels."""
    digits = load_digits()
    images = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(digits.target)
    train, test = train_test_split(range(len(labels)), test_size=0.2, stratify=digits.target, random_state=0)
    return images[train], images[test], labels[train], labels[test]


def make_teacher() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.GELU(),
        nn.Conv2d(16, 32, 3, padding=1, stride=2),
        nn.GELU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(32 * 4 * 4, 128),
        nn.GELU(),
        nn.Linear(128, CLASSES),
    )


def make_student() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 48), nn.GELU(), nn.Linear(48, CLASSES))


def batch_indices(size: int, batch_size: int, steps: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(size, (batch_size,), generator=generator) for _ in range(steps)]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    with torch.no_grad():
        return (model(images).argmax(-1) == labels).float().mean().item()


def train_teacher(args: argparse.Namespace) -> dict[str, Tensor]:
    device = common.prepare(args)
    images, _, labels, _ = (part.to(device) for part in load_images())
    teacher = make_teacher().to(device)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=args.teacher_steps)
    for index in common.progress(batch_indices(len(images), TEACHER_BATCH, args.teacher_steps, args.seed), "teacher"):
        # Moved by up to a pixel: more views than the 1437 images give.
        down, right = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(teacher(torch.roll(images[index], (down, right), (2, 3))), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return {name: weight.cpu() for name, weight in teacher.state_dict().items()}


def load_teacher(path: Path, device: torch.device) -> nn.Module:
    teacher = make_teacher().to(device).eval()
    teacher.load_state_dict(torch.load(path, map_location=device, weights_only=True))
    return teacher


def distill(name: str, args: argparse.Namespace, teacher_path: Path) -> common.Run:
    device = common.prepare(args)
    images, test_images, _, test_labels = (part.to(device) for part in load_images())
    student = make_student().to(device)
    indices = batch_indices(len(images), args.batch_size, args.steps, args.seed + 1)
    return common.distill(
        name,
        student,
        load_teacher(teacher_path, device),
        [images[index] for index in indices],
        args,
        learning_rate=1e-2,
        evaluate=lambda model: accuracy(model, test_images, test_labels),
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    common.add_options(parser)
    args = common.parse(parser, DEFAULTS, QUICK)

    config = {
        "steps": args.teacher_steps,
        "batch_size": TEACHER_BATCH,
        "seed": args.seed,
        "network": str(make_teacher()),
    }
    path, trained = common.cached(args.cache_dir, "digits-teacher", config, lambda: train_teacher(args))
    _, test_images, _, test_labels = load_images()
    teacher_accuracy = accuracy(load_teacher(path, torch.device("cpu")), test_images, test_labels)

    eager, fused = (common.in_own_process(distill, name, args, path) for name in (common.EAGER, common.FUSED))
    example = common.Example(
        name="distill_digits",
        title="Digits: a small student distilled from a convolutional teacher, twice",
        score="accuracy on held-out digits",
        score_format=".1%",
        teacher_score=teacher_accuracy,
        teacher_trained=trained,
        tolerance=TOLERANCE,
        shape=f"[{args.batch_size}, {CLASSES}]",
    )
    return common.report(example, args, eager, fused)


if __name__ == "__main__":
    sys.exit(main())
