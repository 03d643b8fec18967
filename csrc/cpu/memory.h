// Memory of the CPU for gradients and chunks of logits, kept from one step to the next.
//
// A C library maps a large block anew whenever it is asked for, and the system then finds, clears and maps every page
// of it while the gradient is written. That takes as long as the loss itself, and several times as long on a virtual
// machine that gives freed pages back to its host (docs/internals/cpu.md). A smaller block fares the same whenever the
// rest of a step has made the library give the top of its heap back. So the pages of the last gradient that was freed
// are kept, or of the last four where they are small, and those of the last chunks of the losses on hidden states.
//
// They are not withheld from anyone: kept pages are marked with MADV_FREE, all but less than 2 MiB of a block, and the
// kernel takes them back when memory gets scarce, without a word to this process and without writing them anywhere.
//
// On Linux, with torch 2.11 or newer, whose stable ABI makes tensors that say when they are gone; elsewhere, and where
// KDKERNELS_CPU_CACHE=0 is in the environment when this library is loaded, tensors are what torch.empty gives.
#pragma once

#include "../glue.h"

#include <cstddef>
#include <string>
#include <vector>

namespace kdk {

// Asks for huge pages under a fresh output, where the system has them on request: faulting it in by 4 KB pages costs
// more than the kernel.
void prefer_huge_pages(void* data, size_t bytes);

// An uninitialised contiguous tensor of the shape and dtype of logits on the CPU; a large one is in kept memory.
Tensor new_gradient(const Tensor& logits);

// The ops behind kdkernels.memory. An uninitialised contiguous tensor, in memory that is kept for this use:
Tensor kept_empty(std::vector<int64_t> shape, ScalarType dtype, std::string use);
// The sizes in bytes of the blocks that are kept for a use and free.
std::vector<int64_t> kept_blocks(std::string use);
// Fills all tensors that the library makes from here on with NaN, for tests, or no longer does.
void poison_memory(bool on);
// Gives the memory of all free blocks back.
void kept_release();

}  // namespace kdk
