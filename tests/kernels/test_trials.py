"""The choice among plans: trials, what is remembered, and clusters that a GPU cannot place. The GPU is a stub."""

import json
import math
from types import SimpleNamespace
from unittest import mock

import pytest
import torch

pytest.importorskip("triton")

import triton

from kdkernels.kernels import tuning
from kdkernels.kernels.dense import thrown_away

CLUSTER = tuning.Plan("cluster", (4, 4096, 8), 4, 16)
BLOCK = tuning.Plan("cluster", (8, 512, 8), 16)
SWEEPS = tuning.Plan("sweeps", (4, 512, 8), 16)
PLANS = [CLUSTER, BLOCK, SWEEPS]
X = SimpleNamespace(device=torch.device("cuda", 0))
MANY = 2**25


@pytest.fixture
def gpu(monkeypatch, tmp_path):
    """A GPU whose launches take what ``seconds`` says, or fail, and which has room for ``clusters`` of 16 blocks."""
    stub = SimpleNamespace(seconds={CLUSTER: 1.0, BLOCK: 2.0, SWEEPS: 3.0}, clusters=8, tried=[], asked=[])

    def trial(plan):
        stub.tried.append(plan)
        if stub.seconds[plan] == math.inf:
            raise torch.OutOfMemoryError("none left")

    def bench(run, **_):
        run()
        return stub.seconds[stub.tried[-1]]

    def compiled(plan):
        stub.asked.append(plan)
        return SimpleNamespace(_init_handles=lambda: None, function=0, metadata=SimpleNamespace(shared=0))

    utils = SimpleNamespace(cuOccupancyMaxActiveClusters=lambda *_: stub.clusters)
    active = SimpleNamespace(utils=utils)
    monkeypatch.delenv("KDKERNELS_AUTOTUNE", raising=False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "stub")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(triton.testing, "do_bench", bench)
    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=active))
    monkeypatch.setattr(tuning, "_cache_file", lambda: tmp_path / "plans.json")
    monkeypatch.setattr(tuning, "_PLACEABLE", {})
    monkeypatch.setattr(tuning, "_CHOSEN_NOW", {})

    def choose(numel=MANY, key=("form",), plans=PLANS):
        return tuning.fastest(list(plans), key, X, numel, trial, compiled)

    stub.choose = choose
    stub.file = tmp_path / "plans.json"
    tuning._chosen.cache_clear()
    yield stub
    tuning._chosen.cache_clear()


def test_the_fastest_is_found_once_and_kept(gpu):
    gpu.seconds[BLOCK] = 0.5
    assert gpu.choose() == BLOCK and gpu.tried == PLANS
    tuning._chosen.cache_clear()
    assert gpu.choose() == BLOCK and gpu.tried == PLANS
    assert len(json.loads(gpu.file.read_text())) == 1
    # A plan that the table no longer has is no choice.
    gpu.file.write_text(json.dumps(dict.fromkeys(tuning._chosen(), "another")))
    tuning._chosen.cache_clear()
    assert gpu.choose() == BLOCK and gpu.tried == PLANS * 2


def test_a_failed_trial_is_not_kept(gpu):
    gpu.seconds[CLUSTER] = math.inf
    assert gpu.choose() == BLOCK and gpu.choose() == BLOCK
    assert gpu.tried == PLANS and not gpu.file.exists()
    gpu.seconds = dict.fromkeys(PLANS, math.inf)
    assert gpu.choose(key=("another",)) == SWEEPS
    assert not gpu.file.exists()


@pytest.mark.parametrize("clusters", [0, 1])
@pytest.mark.parametrize("why", ["few elements", "KDKERNELS_AUTOTUNE", "deterministic", "capture"])
def test_without_trials_the_first_that_can_be_placed_runs(gpu, clusters, why, monkeypatch):
    gpu.clusters = clusters
    if why == "KDKERNELS_AUTOTUNE":
        monkeypatch.setenv(why, "0")
    if why == "capture":
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    deterministic = why == "deterministic"
    with mock.patch.object(torch, "are_deterministic_algorithms_enabled", lambda: deterministic):
        for _ in range(2):
            assert gpu.choose(1000 if why == "few elements" else MANY) == (CLUSTER if clusters else BLOCK)
    # The driver is asked once, and about nothing but clusters.
    assert gpu.asked == [CLUSTER] and gpu.tried == []


OTHER = tuning.Plan("cluster", (4, 2048, 8), 8, 8)


@pytest.mark.parametrize("why", ["few elements", "KDKERNELS_AUTOTUNE", "capture"])
def test_no_kernel_is_compiled_that_is_not_to_run(gpu, why, monkeypatch):
    """To ask whether a cluster fits takes its kernel: not one more than until the first that fits."""
    plans = [CLUSTER, OTHER, BLOCK, SWEEPS]
    if why == "KDKERNELS_AUTOTUNE":
        monkeypatch.setenv(why, "0")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: why == "capture")
    assert gpu.choose(1000 if why == "few elements" else MANY, plans=plans) == CLUSTER and gpu.asked == [CLUSTER]
    gpu.clusters = 0
    assert gpu.choose(1000 if why == "few elements" else MANY, key=("more",), plans=plans) == BLOCK
    assert gpu.asked == [CLUSTER, CLUSTER, OTHER] and gpu.tried == []


def test_what_was_chosen_before_is_asked_about_alone(gpu):
    plans = [CLUSTER, OTHER, BLOCK, SWEEPS]
    gpu.seconds |= {OTHER: 0.5}
    assert gpu.choose(plans=plans) == OTHER
    tuning._chosen.cache_clear()
    tuning._PLACEABLE.clear()
    gpu.asked.clear()
    assert gpu.choose(plans=plans) == OTHER and gpu.asked == [OTHER] and gpu.tried == plans


@pytest.mark.parametrize("text", ["[]", "3", '{"NAME": ["a plan"]}', '{"NAME": null}', "{"])
def test_a_file_of_choices_that_is_none_is_as_if_it_were_not_there(gpu, text):
    name = " ".join(("stub", triton.__version__, "form"))
    gpu.file.write_text(text.replace("NAME", name))
    assert gpu.choose() == CLUSTER and json.loads(gpu.file.read_text())[name] == str(tuple(CLUSTER))


def test_a_cluster_that_cannot_be_placed_is_not_tried(gpu):
    gpu.clusters = 0
    assert gpu.choose() == BLOCK and gpu.tried == [BLOCK, SWEEPS]


@pytest.mark.parametrize("L", [None, 3])
def test_a_gradient_that_is_thrown_away_starts_where_the_real_one_does(L):
    buffer = torch.zeros(2, 5, 1003, dtype=torch.bfloat16)
    real = buffer[:, 1:4, 2:1001] if L else buffer[0, 1:4, 2:1001]
    rows = 5 if L else 3
    scratch = thrown_away(real, rows, L)
    assert scratch.ptr.data_ptr() % 32 == real.data_ptr() % 32
    b, line = divmod(rows - 1, L) if L else (0, rows - 1)
    last = b * scratch.stride_b + line * scratch.stride_l
    assert scratch.stride_l == real.stride(-2) and last + real.shape[-1] <= scratch.ptr.numel()
    assert thrown_away(None, rows, L).ptr is None
