// The dense pattern on CUDA: loss and gradient of a row from one read of student and teacher, 2R + 1W, where they fit
// into the shared memory of a block or of a cluster of blocks.
//
// The blocks stay: a cluster takes one row after the other, and while it works on one, the next one's logits come into
// the other stage of shared memory, by bulk copies that one thread starts, or by copies of each thread's own where rows
// do not lie on 16 bytes. A thread always has the same vectors of a stage. Sums over the cluster take one trip: each
// warp stores its part into the shared memory of every block, where a barrier counts the bytes; nothing is fenced at
// the scope of the GPU. The gradient goes into the student's place in shared memory and leaves from there.
//
// Two kernels: one keeps the exponentials of its columns in registers for the gradient; the swept one computes them
// again, of rows too wide for that, or with the less usual parts of the objective, and where a row fits no shared
// memory it reads global memory again.
//
// As in kdkernels/kernels/dense_cluster.py everything is relative to the row's two maxima, and a maximum is subtracted
// before anything is multiplied: the largest exponential is then exactly 1. ds and dt are logits less their maxima, es
// and et exponentials, unit_s and unit_t 1 / temperature.
#pragma once

#include "dense_held.cuh"
#include "dense_swept.cuh"
