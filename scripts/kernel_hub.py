"""Lays the package out as the package ``kernels`` of Hugging Face loads it: the Triton and the plain PyTorch part.

    python scripts/kernel_hub.py [FOLDER]        default: build/hub

FOLDER then has build.toml, which kernel-builder reads, torch-ext/kdkernels, which it builds from, and a folder for each
kind of device in build/, which ``kernels.get_local_kernel`` and, from the hub, ``kernels.get_kernel`` import. A kernel
is imported under a name of its own, beside other versions and beside an installed kdkernels: so imports are relative
there, and its ops have a namespace of their own. scripts/prove-hub loads it and runs the oracle.
"""

import ast
import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "kdkernels"
# The major version of the hub: calls that work with it go on working.
VERSION = 1
BACKENDS = ("cpu", "cuda", "rocm", "xpu")
# The command and what belongs to it.
LEFT_OUT = {"__main__.py", "cli.py", "commands.py", "bench.py", "env.py", "cache/capture.py"}
REASON = "it is not part of the kernel from the hub; an installed kdkernels has it"

BUILD = f"""[general]
edition = 5
name = "kdkernels"
version = {VERSION}
license = "Apache-2.0"
backends = [{", ".join(f'"{backend}"' for backend in BACKENDS)}]

[torch]
"""
CARD = """---
library_name: kernels
license: apache-2.0
---

# kdkernels

Fused distillation losses for PyTorch: the Triton kernels, and plain PyTorch on a CPU.

```python
from pathlib import Path
from kernels import get_local_kernel

kd = get_local_kernel(Path("."))
loss = kd.kd_loss(student_logits, teacher_logits, temperature=2.0)
```
"""


def sources() -> dict[str, str]:
    """The text of every module by its path in the package."""
    paths = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}
    kept = {name: path for name, path in paths.items() if name not in LEFT_OUT and not name.startswith("compat/")}
    return {name: path.read_text() for name, path in kept.items()}


def translated(name: str, text: str, namespace: str) -> str:
    """A module with relative imports, whose ops are in a namespace."""
    lines = text.split("\n")
    # From a/b.py the package is two dots away.
    dots = "." * (name.count("/") + 1)
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and not node.level and (node.module or "").split(".")[0] == "kdkernels":
            below = (node.module or "").partition(".")[2]
            lines[node.lineno - 1] = lines[node.lineno - 1].replace(f"from {node.module} ", f"from {dots}{below} ", 1)
        elif isinstance(node, ast.Import) and any(item.name.split(".")[0] == "kdkernels" for item in node.names):
            raise SystemExit(f"{name}:{node.lineno}: an import by the full name cannot be made relative")
    text = "\n".join(lines)
    text = re.sub(r"\btorch\.ops\.kdkernels\b", f"torch.ops.{namespace}", text)
    text = re.sub(r"\bkdkernels::", f"{namespace}::", text)
    text = text.replace('Library("kdkernels"', f'Library("{namespace}"')
    return text.replace('NAMESPACE = "kdkernels"', f'NAMESPACE = "{namespace}"')


def write(folder: Path) -> None:
    """Write the whole layout into a folder, which is emptied first."""
    texts = sources()
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:8]
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "torch-ext").mkdir(parents=True)
    (folder / "build.toml").write_text(BUILD)
    (folder / "README.md").write_text(CARD)
    shutil.copy(ROOT / "LICENSE", folder)
    record = {kind: {"built": False, "reason": REASON, "cure": ""} for kind in ("cpu", "cuda")}
    for backend in BACKENDS:
        name = f"_kdkernels_{backend}_{digest}"
        into = folder / "build" / f"torch-{backend}"
        _write(into, texts, name, record)
        metadata = {
            "id": name,
            "name": "kdkernels",
            "version": VERSION,
            "license": "Apache-2.0",
            "python-depends": [],
            "backend": {"type": backend},
        }
        (into / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    _write(folder / "torch-ext" / "kdkernels", texts, f"_kdkernels_{digest}", record)


def _write(folder: Path, texts: dict[str, str], namespace: str, record: dict) -> None:
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(translated(name, text, namespace))
    (folder / "_build_info.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "build" / "hub"
    write(target)
    print(f"wrote {target}: build.toml, torch-ext, and build/ for {', '.join(BACKENDS)}")
