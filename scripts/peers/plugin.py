"""A plugin of pytest for another library's tests: the names that they import are those of ``kdkernels.compat``.

``KDKERNELS_PEER`` names the library, ``KDKERNELS_PEER_ELEMENTS`` how large a test's tensors may be. Modules of the
library that are not named below are empty: a test that needs more than the losses says so by ``NotOfCompat``.
"""

import importlib
import importlib.abc
import importlib.machinery
import os
import sys
import types

import torch

from kdkernels import compat  # noqa: F401
from kdkernels.compat import axolotl, liger, specforge, speculators, torchtune
from kdkernels.compat import sentence_transformers as st

PEER = os.environ["KDKERNELS_PEER"]
LARGEST = int(float(os.environ.get("KDKERNELS_PEER_ELEMENTS", "1e6")))


class NotOfCompat(Exception):
    """A name of the library that kdkernels.compat has none of."""


def function(call):
    """A loss where a test applies an autograd Function."""
    return type("Function", (), {"apply": staticmethod(call)})


def absent(name):
    def call(*_, **__):
        raise NotOfCompat(name)

    return type(name, (), {"__init__": call, "__class_getitem__": classmethod(lambda cls, _: cls), "apply": call})


def chunked_jsd(*args):
    student, weight, teacher, teacher_weight, labels, bias, teacher_bias, *options = args
    hard, soft, beta, ignore, temperature, *rest = options
    parts = bool(rest[2]) if len(rest) > 2 else False
    loss = liger.LigerFusedLinearJSDLoss(hard, soft, beta, ignore, temperature, return_soft_hard_loss=parts)
    return loss(student, weight, teacher, teacher_weight, labels, bias, teacher_bias)


def functional_chunked(student, weight, teacher, teacher_weight, labels, *biases_and_options):
    biases = [*biases_and_options[:2], None, None][:2]
    return chunked_jsd(student, weight, teacher, teacher_weight, labels, *biases, *biases_and_options[2:])


def kl_div(y_pred, y_true, reduction="batchmean", log_target=False, eps=1e-10):
    return liger.liger_kl_div(y_pred, y_true, reduction=reduction, log_target=log_target)


def assert_expected(found, expected, rtol=None, atol=None, **_):
    torch.testing.assert_close(found, expected, rtol=rtol or 1e-5, atol=atol or 1e-8)


# Of each module of a library: names, and what stands for them.
NAMES = {
    "liger": {
        "liger_kernel.transformers.kl_div": {"LigerKLDIVLoss": liger.LigerKLDIVLoss},
        "liger_kernel.transformers.jsd": {"LigerJSD": liger.LigerJSD, "LigerJSDFunction": function(liger.liger_jsd)},
        "liger_kernel.transformers.tvd": {"LigerTVDLoss": liger.LigerTVDLoss},
        "liger_kernel.transformers.fused_linear_jsd": {"LigerFusedLinearJSD": liger.LigerFusedLinearJSD},
        "liger_kernel.transformers.functional": {
            "liger_jsd": liger.liger_jsd,
            "liger_fused_linear_jsd": liger.liger_fused_linear_jsd,
        },
        "liger_kernel.ops": {"LigerFusedLinearJSDFunction": function(liger.liger_fused_linear_jsd)},
        "liger_kernel.chunked_loss": {"LigerFusedLinearJSDLoss": liger.LigerFusedLinearJSDLoss},
        "liger_kernel.chunked_loss.functional": {"liger_fused_linear_jsd": functional_chunked},
        "liger_kernel.chunked_loss.jsd_loss": {"LigerFusedLinearJSDFunction": function(chunked_jsd)},
        "liger_kernel.utils": {"infer_device": lambda: "cpu", "is_npu_available": lambda: False},
    },
    "torchtune": {
        "torchtune.modules.loss": vars(torchtune),
        "torchtune.training.seed": {"set_seed": torch.manual_seed},
        "tests.test_utils": {"assert_expected": assert_expected},
    },
    "axolotl": {
        "axolotl.integrations.kd.topk_logprob.forward_kl": vars(axolotl),
        "axolotl.integrations.kd.kernels.liger": vars(axolotl),
    },
    "sentence-transformers": {
        "sentence_transformers.sentence_transformer.losses": {"DistillKLDivLoss": st.DistillKLDivLoss}
    },
    "speculators": {
        "speculators.losses": {**vars(speculators), "eager": speculators},
        "speculators.losses.eager": vars(speculators),
    },
    "specforge": {"specforge.core.loss": vars(specforge), "specforge.core.lk_loss": vars(specforge)},
    "trl": {},
}
# Marks of tests ask every device, a CPU too, for its memory.
torch.cpu.get_device_properties = lambda _: types.SimpleNamespace(total_memory=0)
TOPS = {name.split(".")[0] for name in NAMES[PEER] if not name.startswith("tests")}
if PEER == "trl":
    from kdkernels.compat import trl

    trl.patch()
    # Parts that the tests of another release ask of it are not there.
    importlib.import_module("trl.import_utils").__getattr__ = lambda name: lambda *_, **__: False


class Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return absent(name)


class Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Modules of the library, which are not installed."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in TOPS or name in NAMES[PEER]:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec):
        return Module(spec.name)

    def exec_module(self, module):
        given = NAMES[PEER].get(module.__name__, {})
        vars(module).update({name: value for name, value in given.items() if not name.startswith("__")})


sys.meta_path.insert(0, Finder())


def pytest_collection_modifyitems(items):
    """Shapes are cut, from the batch on, until a test's largest tensor has no more elements than it may."""
    for item in items:
        sizes = item.callspec.params if hasattr(item, "callspec") else {}
        if not {"B", "T", "V"} <= set(sizes):
            continue
        sizes["B"] = max(1, min(sizes["B"], LARGEST // (16 * sizes["V"])))
        sizes["T"] = max(8, min(sizes["T"], LARGEST // (sizes["B"] * sizes["V"])))
