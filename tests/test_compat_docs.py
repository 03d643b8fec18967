"""The tables of docs/guide/compat.md: what one wrote and what one writes have the same loss and gradients."""

import importlib
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import kdkernels as kd

PAGE = Path(__file__).resolve().parent.parent / "docs" / "guide" / "compat.md"
NAMES = ["liger", "torchtune", "trl", "modelopt", "mdistiller", "speculators", "distillkit"]
MODULES = {name: importlib.import_module(f"kdkernels.compat.{name}") for name in NAMES}
ROWS = re.findall(r"^\|(?: [\w ]+ \|)? `(.+)` \| `(.+)` \|$", PAGE.read_text(), flags=re.M)
# PyTorch's own mean warns.
pytestmark = pytest.mark.filterwarnings("ignore:reduction. 'mean' divides")


def evaluated(code, masked):
    torch.manual_seed(0)
    shapes = {"s": (6, 20), "t": (6, 20), "h": (6, 4), "w": (20, 4), "g": (6, 5), "u": (20, 5)}
    tensors = {name: torch.randn(shape, dtype=torch.float64) for name, shape in shapes.items()}
    learning = [tensors[name].requires_grad_() for name in "shw"]
    labels = torch.tensor([3, -100, 0, 7, -100, 2] if masked else [3, 19, 0, 7, 7, 2])
    loss = eval(code, {"kd": kd, "F": F, "y": labels, "T": 2.0, **MODULES, **tensors})
    grads = torch.autograd.grad(loss.sum(), learning, allow_unused=True)
    return loss, [grad for grad in grads if grad is not None]


@pytest.mark.parametrize("wrote, write", ROWS, ids=[f"{i}-{wrote[:30]}" for i, (wrote, _) in enumerate(ROWS)])
def test_what_one_wrote_and_what_one_writes(wrote, write):
    # PyTorch's cross entropy has a mask, and its KL has none.
    masked = "F.cross_entropy" not in wrote
    found, expected = (evaluated(code, masked) for code in (write, wrote))
    torch.testing.assert_close(found[0], expected[0])
    assert len(found[1]) == len(expected[1]) > 0
    for a, b in zip(found[1], expected[1], strict=True):
        torch.testing.assert_close(a, b)


def test_the_rows_are_found():
    text = PAGE.read_text()
    lines = [line for line in text.splitlines() if line.startswith("| ") and "`" in line]
    assert len(ROWS) == len(lines) > 20
