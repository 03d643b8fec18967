"""The layout for the package ``kernels``: imported as that does, under a name of its own and beside the installed one.

scripts/prove-hub does the same with the package itself, and in Triton's interpreter.
"""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch

import kdkernels
from kdkernels import divergences

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    if not (ROOT / "kdkernels").is_dir():
        pytest.skip("not a checkout: the package's source is not here")
    spec = importlib.util.spec_from_file_location("kernel_hub", ROOT / "scripts" / "kernel_hub.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    folder = tmp_path_factory.mktemp("hub")
    module.write(folder)
    return module, folder


@pytest.fixture(scope="module")
def kernel(hub):
    _, folder = hub
    variant = folder / "build" / "torch-cpu"
    name = json.loads((variant / "metadata.json").read_text())["id"]
    spec = importlib.util.spec_from_file_location(name, variant / "__init__.py")
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_kind_of_device_has_a_variant_and_a_namespace_of_its_own(hub):
    module, folder = hub
    described = [json.loads(path.read_text()) for path in sorted(folder.glob("build/torch-*/metadata.json"))]
    assert [item["backend"]["type"] for item in described] == sorted(module.BACKENDS)
    assert len({item["id"] for item in described}) == len(module.BACKENDS)
    assert all(item["version"] == module.VERSION and item["name"] == "kdkernels" for item in described)
    for item in described:
        text = (folder / "build" / f"torch-{item['backend']['type']}" / "ops.py").read_text()
        assert f'NAMESPACE = "{item["id"]}"' in text and "kdkernels::" not in text.replace(f"{item['id']}::", "")


def test_a_kernel_imports_nothing_of_an_installed_package(kernel):
    loaded = [name for name in sys.modules if name.startswith(kernel.__name__)]
    assert len(loaded) > 20 and set(kdkernels.__all__) == set(kernel.__all__)
    for name in loaded:
        for item in vars(sys.modules[name]).values():
            assert not str(getattr(item, "__module__", "")).startswith("kdkernels"), (name, item)
    assert kernel.backends.select("auto", "cpu") == "torch"
    assert "not part of the kernel" in kernel.backends.cpu.load_error()


@pytest.mark.parametrize("name", divergences.names())
def test_the_oracle_passes_through_the_kernel(kernel, name):
    testing = importlib.import_module(f"{kernel.__name__}.testing")
    student, teacher = testing.make_inputs("normal", 5, 130, torch.float32)
    testing.check_kd_loss(student, teacher, divergence=name, temperature=2.0)


def test_ops_of_both_are_registered_side_by_side(kernel):
    student, teacher = torch.randn(3, 9), torch.randn(3, 9)
    mine = kernel.kd_loss(student, teacher, backend="torch")
    torch.testing.assert_close(mine, kdkernels.kd_loss(student, teacher, backend="torch"))
    for namespace in (kernel.__name__, "kdkernels"):
        assert hasattr(getattr(torch.ops, namespace), "dense_fwd_triton")


def test_an_import_that_cannot_be_made_relative_is_refused(hub):
    module, _ = hub
    with pytest.raises(SystemExit, match="a.py:1: an import by the full name"):
        module.translated("a.py", "import kdkernels.ops", "x")
    assert module.translated("a/b.py", "from kdkernels.c import d", "x") == "from ..c import d"
    assert module.translated("a.py", "from kdkernels import d", "x") == "from . import d"
