"""Distill a convolutional teacher of handwritten digits into a small student.

The data are the 1797 test digits of Alpaydin and Kaynak, Optical Recognition of Handwritten Digits (UCI Machine
Learning Repository 1998, doi:10.24432/C50P49, CC BY 4.0), 8 x 8 pixels each, in a file beside this one; no download.
The student never sees a label.
"""

import argparse
import gzip
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import kdkernels as kd

CLASSES = 10


def load_images() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training images [1442, 1, 8, 8], test images [355, 1, 8, 8] in [0, 1], and their labels."""
    text = gzip.decompress((Path(__file__).parent / "digits.csv.gz").read_bytes()).decode()
    rows = torch.tensor([[float(cell) for cell in line.split(",")] for line in text.split()])
    images, labels = rows[:, :64].view(-1, 1, 8, 8) / 16, rows[:, 64].long()
    # Every fifth image of a class: the classes are as frequent in both parts.
    of_class = F.one_hot(labels).cumsum(0).gather(1, labels[:, None])[:, 0]
    test = of_class % 5 == 0
    return images[~test], images[test], labels[~test], labels[test]


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


def train_teacher(images: Tensor, labels: Tensor, steps: int) -> nn.Module:
    teacher = make_teacher().to(images.device)
    optimizer = torch.optim.AdamW(teacher.parameters(), lr=5e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(steps):
        index = torch.randint(len(images), (64,))
        # Moved by up to a pixel: more views than the images give.
        down, right = torch.randint(-1, 2, (2,)).tolist()
        loss = F.cross_entropy(teacher(torch.roll(images[index], (down, right), (2, 3))), labels[index])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return teacher.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(-1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=400, help="training steps of the student (default: %(default)s)")
    parser.add_argument("--teacher-steps", type=int, default=600, help="of the teacher (default: %(default)s)")
    parser.add_argument("--temperature", type=float, default=4.0, help="(default: %(default)s)")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # more gain nothing on networks this small
    device = "cuda" if torch.cuda.is_available() else "cpu"
    images, test_images, labels, test_labels = (part.to(device) for part in load_images())
    teacher = train_teacher(images, labels, args.teacher_steps)
    print(f"teacher: {accuracy(teacher, test_images, test_labels):.1%} of the test digits right")

    student = make_student().to(device)
    optimizer = torch.optim.AdamW(student.parameters(), lr=5e-3)
    kd_loss = kd.KDLoss(temperature=args.temperature, reduction="batchmean")
    for step in range(1, args.steps + 1):
        batch = images[torch.randint(len(images), (128,))]
        with torch.no_grad():
            target = teacher(batch)
        loss = kd_loss(student(batch), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == args.steps:
            print(f"step {step}: loss {loss.item():.4f}")
    print(f"student: {accuracy(student, test_images, test_labels):.1%} of the test digits right")


if __name__ == "__main__":
    main()
