"""Calls captured into a CUDA graph: replayed on other inputs they give what a call of its own gives."""

import pytest
import torch
from one_call import CALLS, lacking, make

pytestmark = pytest.mark.gpu

KINDS = {call.name: call for call in CALLS if call.columns in (1000, 4097, 50257, 128256)}


def replayed(call, backend, device="cuda"):
    """The results of a graph of the call on some inputs after others took their place, and of a call on those."""
    first, second = (make(call, device, seed) for seed in (1, 2))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # compilation and trials
            call.run(first, backend)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call.run(first, backend)
    for ours, theirs in zip(first, second, strict=True):
        ours.copy_(theirs)
    graph.replay()
    torch.cuda.synchronize()
    return found, call.run(second, backend)


@pytest.mark.parametrize("backend", ["triton", "cuda"])
@pytest.mark.parametrize("name", KINDS)
def test_a_graph_replays_on_other_inputs(name, backend):
    reason = lacking(KINDS[name], "cuda", backend)
    if reason is not None:
        pytest.skip(reason.splitlines()[0])
    found, want = replayed(KINDS[name], backend)
    for got, value in zip(found, want, strict=True):
        torch.testing.assert_close(got, value, rtol=0, atol=0)
