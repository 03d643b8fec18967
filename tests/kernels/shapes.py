"""Launch shapes of the tests: small, so that a few hundred columns take several tiles or pieces."""

import triton

from kdkernels.kernels import tuning


def tiles(lanes, columns=16, num_warps=1):
    """A stand-in for ``tuning.shape`` of so many columns a lane."""

    def shape(V, itemsize, *, vec=None, **_):
        vec = vec or 16 // itemsize
        return tuning.Shape((columns // vec, lanes, vec), num_warps)

    return shape


def resident(V, vec, cut, lanes, **options):
    """A plan of one pass in pieces of one vector a lane."""
    pieces = triton.cdiv(V + cut * (vec - 1), lanes * vec)
    return tuning.Plan("cluster", (pieces, lanes, vec), 1, **options)
