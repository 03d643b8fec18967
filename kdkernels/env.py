"""``python -m kdkernels env``: versions, the backend "auto" takes for CPU and GPU tensors, and why not the others."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch

import kdkernels
from kdkernels import backends, build_info, ops
from kdkernels.backends import cpu, cuda

# Losses and what makes them; those on hidden states make the dense or the sparse one of each chunk.
LOSSES = {
    "kd_loss, taid_loss, lk_loss, linear_kd_loss, linear_lk_loss": "dense_fwd",
    "topk_kd_loss, linear_topk_kd_loss": "topk_fwd",
    "dkd_loss": "dkd_fwd",
    "logit_mse_loss": "mse_fwd",
    "uld_loss": "uld_fwd",
    "kd_loss of rows side by side (dim)": "pixel_fwd",
    "kd_loss of a sharded vocabulary": "shard_fwd",
    "capture_topk": "capture_topk",
    "capture_topp, akl_ratio": "topp_count",
    "token_logprobs, gather_logprobs, linear_token_logprobs, linear_gather_logprobs": "token_fwd",
}


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _kdkernels() -> str:
    """The version that pip lists. An editable installation keeps the one of its day, so that both may be there."""
    listed = build_info.installed_version()
    if listed is None or listed.partition("+")[0] == kdkernels.__version__:
        return listed or kdkernels.__version__
    return f"{kdkernels.__version__} (pip lists {listed})"


def _gpu() -> str:
    if not torch.cuda.is_available():
        return "none that this torch can use"
    names = (torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count()))
    return ", ".join(f"{gpu.name} (compute capability {gpu.major}.{gpu.minor})" for gpu in names)


def _package() -> str:
    root = build_info.source_tree()
    return str(build_info.PACKAGE) + ("" if root is None else " (a source tree, not an installation)")


def _built(backend: str) -> str:
    """A library that is there and loads: where, what is in it, and what made it."""
    path = build_info.find(backend)
    assert path is not None
    record, root = build_info.read(path.parent), build_info.source_tree()
    said = f"{path}\n{'':<11}{build_info.summary(backend, record)}"
    if path.parent != build_info.PACKAGE:
        said += f"\n{'':<11}of the package installed there: this source tree has none, and agrees with its sources"
    elif root is not None and record and record.get("sources") != build_info.source_hash(root):
        said += f"\n{'':<11}older than the sources beside it; {build_info.rebuild_command(backend)}"
    return said


def _extension() -> str:
    return cpu.load_error() or f"{_built('cpu')}\n{'':<11}runs {cpu.isa()} here"


def _cuda_extension() -> str:
    return cuda.load_error() or _built("cuda")


def _choice(device_type: str) -> list[str]:
    answers = backends.available(device_type)
    where = " (there is no such device here)" if device_type == "cuda" and not torch.cuda.is_available() else ""
    lines = [f'{device_type} tensors{where}: "auto" takes {backends.select("auto", device_type)!r}']
    lines += [f"  {answer.name:<8}{_runs(answer.name) if answer.ok else 'no: ' + answer.reason}" for answer in answers]
    return lines


def _runs(backend: str) -> str:
    reserved = [reasons[backend] for reasons in ops.BY_NAME_ONLY.values() if backend in reasons]
    return "; ".join(["runs", *(f'not by "auto": {reason}' for reason in reserved)])


def _of_losses(device_type: str) -> dict[str, str]:
    """The backend that "auto" takes for each loss."""
    return {names: backends.select("auto", device_type, pattern=pattern) for names, pattern in LOSSES.items()}


def _losses_lines(device_type: str) -> list[str]:
    """One line where all losses take the same backend, else one for each kind of loss."""
    taken = _of_losses(device_type)
    if len(set(taken.values())) == 1:
        return [f"  every loss takes {next(iter(taken.values()))!r}"]
    return [f"  {names} {'take' if ',' in names else 'takes'} {backend!r}" for names, backend in taken.items()]


def _facts() -> dict[str, str]:
    built_for = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    return {
        "kdkernels": _kdkernels(),
        "package": _package(),
        "python": f"{platform.python_version()} ({platform.system()} {platform.machine()})",
        "torch": f"{torch.__version__} ({built_for if torch.version.cuda or torch.version.hip else 'CPU build'})",
        "triton": _version("triton"),
        "extension": _extension(),
        "cuda ext": _cuda_extension(),
        "threads": str(torch.get_num_threads()),
        "gpu": _gpu(),
    }


def report() -> str:
    """Text of one fact a line: the versions here, the libraries, and the backend that "auto" takes."""
    lines = [f"{name:<11}{fact}" for name, fact in _facts().items()]
    for device_type in ("cpu", "cuda"):
        lines += [*_choice(device_type), *_losses_lines(device_type)]
    return "\n".join(lines)


def to_json() -> str:
    """The facts of ``report`` as JSON, for reports of faults: no name of this machine, and no path of its user."""
    facts: dict[str, Any] = {name: fact for name, fact in _facts().items() if name != "package"}
    for name, backend, module in (("extension", "cpu", cpu), ("cuda ext", "cuda", cuda)):
        path = build_info.find(backend)
        reason = module.load_error()
        facts[name] = {"loads": reason is None}
        if path is not None:
            facts[name]["built"] = build_info.summary(backend, build_info.read(path.parent))
        if reason is not None:
            facts[name]["reason"] = reason
    if cpu.load_error() is None:
        facts["extension"]["runs"] = cpu.isa()
    facts["source tree"] = build_info.source_tree() is not None
    facts["devices"] = {
        device_type: {
            "auto": backends.select("auto", device_type),
            "backends": {answer.name: answer.reason or "runs" for answer in backends.available(device_type)},
            "losses": _of_losses(device_type),
        }
        for device_type in ("cpu", "cuda")
    }
    packages = ("numpy", "safetensors", "transformers", "accelerate", "trl", "peft")
    facts["packages"] = {name: _version(name) for name in packages}
    text = json.dumps(facts, indent=1)
    hidden = {sys.executable: "python", str(build_info.PACKAGE.parent): "<source>"}
    source = build_info.installed_from(build_info.PACKAGE)
    hidden |= {source: "<source>"} if source else {}
    hidden[str(Path.home())] = "~"
    for path_of_user, name in hidden.items():
        text = text.replace(path_of_user, name)
    return text


if __name__ == "__main__":
    # python -m kdkernels.env would otherwise print nothing.
    print(report())
